// See generators.h.
#include "properties/generators.h"

#include <algorithm>
#include <numeric>
#include <set>

#include "core/utf8.h"

namespace isoshard::properties {
namespace {

// Uniform in [low, high], whatever RapidCheck's size; shrinks to low.
int draw(int low, int high) { return *rc::gen::resize(100, rc::gen::inRange(low, high + 1)); }

bool one_in(int count) { return draw(0, count - 1) == count - 1; }

template <typename Value>
Value draw_from(const std::vector<Value>& values) {
  return values[static_cast<size_t>(draw(0, static_cast<int>(values.size()) - 1))];
}

void append_utf8(std::string* text, uint32_t c) {
  if (c < 0x80) {
    *text += static_cast<char>(c);
    return;
  }
  const int tails = c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
  constexpr uint32_t kLead[] = {0, 0xC0, 0xE0, 0xF0};
  *text += static_cast<char>(kLead[tails] | (c >> (6 * tails)));
  for (int i = tails - 1; i >= 0; --i) *text += static_cast<char>(0x80 | ((c >> (6 * i)) & 0x3F));
}

uint32_t draw_code_point() {
  static const std::vector<uint32_t> kAwkward = {
      ' ',    '"',    '\'',   '`',    '$',    '&',    ';',     ':',     '~',     '%',     '=',
      ',',    '@',    '#',    '!',    '<',    '>',    '[',     ']',     '(',     ')',     '{',
      '}',    '*',    '+',    '?',    '.',    '^',    '|',     '\\',    '-',     '_',     0x00A0,
      0x00E9, 0x0301, 0x0130, 0x05D0, 0x0644, 0x200B, 0x200D,  0x2028,  0x202E,  0x3000,  0x65E5,
      0xAC00, 0xE000, 0xFB01, 0xFEFF, 0xFFFD, 0xFFFF, 0x10000, 0x1F600, 0x1F468, 0x10FFFF};
  switch (draw(0, 3)) {
    case 0:
      return static_cast<uint32_t>(draw('a', 'z'));
    case 1:
      return static_cast<uint32_t>(draw('0', '9'));
    case 2:
      return draw_from(kAwkward);
    default:
      break;
  }
  const uint32_t c = static_cast<uint32_t>(draw(0xA0, 0x10FFFF));
  return c >= 0xD800 && c <= 0xDFFF ? 0xD7FF : c;
}

// A name that contracts §6 accepts, unlike all in `taken`, and no file name of a universal folder.
std::string draw_name(std::set<std::string>* taken) {
  std::string text;
  const int components = draw(1, 3);
  for (int i = 0; i < components; ++i) {
    if (i > 0) text += one_in(3) ? '/' : '.';
    const int length = draw(1, 4);
    for (int k = 0; k < length; ++k) append_utf8(&text, draw_code_point());
  }
  if (!why_unsafe_name(text).empty() || text.find(".pt") != std::string::npos) text = "p";
  while (!taken->insert(text).second) text += "'";
  return text;
}

Shape draw_shape(const Case& value) {
  const int ranks = draw_from(std::vector<int>{value.a.ranks(), value.b.ranks(), value.c.ranks()});
  switch (draw(0, 7)) {
    case 0:
      return {draw(1, 9)};
    case 1:
      return {draw(1, 4), draw(1, 5)};
    case 2:
      return {};
    case 3:
      return {std::max(1, draw(1, 3) * ranks - 1)};
    case 4:
      return {draw(1, 3) * ranks};
    case 5:
      return {draw(1, 3) * ranks + 1};
    case 6:
      return one_in(2) ? Shape{0} : Shape{draw(0, 2), 0, 3};
    default:
      break;
  }
  return {draw(1, 2), draw(1, 7), draw(1, 3)};
}

void draw_parameters(Case* value, int most) {
  Model& model = value->model;
  std::set<std::string> taken;
  const int count = draw(1, most);
  const int groups = draw(1, 3);
  for (int i = 0; i < count; ++i) {
    ModelParameter parameter;
    parameter.name = draw_name(&taken);
    parameter.shape = i == 0 ? Shape{draw(1, 12)} : draw_shape(*value);
    parameter.group = i == 0 ? 0 : draw(0, groups - 1);
    if (i > 0 && one_in(5)) parameter.group = -1;
    if (one_in(60)) {
      parameter.zeros = true;
      parameter.shape = {draw(1025, 2400)};
    }
    if (one_in(6) && numel(parameter.shape) > 0) parameter.alias = draw_name(&taken);
    model.parameters.push_back(parameter);
  }
  const std::vector<DType> dtypes = {DType::kFloat32, DType::kInt64,   DType::kBool,
                                     DType::kUInt8,   DType::kFloat16, DType::kBFloat16,
                                     DType::kFloat64};
  const int buffers = std::min(count, draw(0, 2));
  for (int i = 0; i < buffers; ++i) {
    model.buffers.push_back({draw_name(&taken), draw_from(dtypes), draw_shape(*value)});
  }
}

void draw_optimizer(Model* model) {
  static const std::vector<std::vector<std::string>> kSchemas = {
      {"exp_avg", "exp_avg_sq"},
      {"momentum_buffer"},
      {"sum"},
      {},
      {"square_avg", "acc_delta"},
      {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}};
  for (const std::string& name : draw_from(kSchemas)) {
    const DType dtype = one_in(6) ? draw_from(std::vector<DType>{DType::kBFloat16, DType::kFloat16})
                                  : DType::kFloat32;
    model->states.push_back({name, dtype});
  }
  const int form = draw(0, 4);
  if (form < 4) model->scalars.push_back({"step", static_cast<ScalarKind::Form>(form), draw(0, 9)});
  if (one_in(6)) model->scalars.push_back({"mu_product", ScalarKind::Form::kTensor, 1});
}

Model draw_settings() {
  Model model;
  model.seed = static_cast<uint64_t>(draw(1, 1'000'000));
  model.dtype = draw_from(std::vector<DType>{DType::kBFloat16, DType::kFloat32, DType::kFloat16});
  model.reversed = one_in(4);
  model.round_robin = one_in(3);
  model.aligned = one_in(4);
  model.bf16_optimizer = one_in(4);
  model.dynamic_scale = model.dtype == DType::kFloat16 && one_in(2);
  model.client_state = one_in(4);
  model.sub_group_size = draw_from(std::vector<int64_t>{1'000'000'000, 1, 3, 8, 20});
  return model;
}

Job draw_job(int lowest_stage) {
  Job job{.data = draw(1, 5), .sequence = one_in(4) ? 2 : 1, .stage = draw(lowest_stage, 3)};
  if (one_in(8)) job.data = draw(6, 8);
  if (!one_in(3)) return job;
  job.sequence = 1;  // DeepSpeed has no files for both
  job.tensor = draw(2, 4);
  return job;
}

// How tensor-parallel ranks would share each parameter. Every group of the optimizer keeps one that
// is whole everywhere: DeepSpeed has no files for a rank without any element of a group.
void draw_cuts(Model* model) {
  using reference::Cut;
  model->heads = draw_from(std::vector<int64_t>{0, 0, 1, 2, 3, 4});
  model->grain = draw_from(std::vector<int64_t>{1, 1, 1, 2, 4});
  model->maps = !one_in(3);
  std::set<int> with_whole;
  for (size_t i = 0; i < model->parameters.size(); ++i) {
    ModelParameter& parameter = model->parameters[i];
    const Shape& shape = parameter.shape;
    if (numel(shape) == 0 || shape.empty()) continue;
    if (model->owned(i) && with_whole.insert(parameter.group).second) continue;
    const int kind = draw(0, 3);
    if (kind == 1) parameter.cut = Cut::kColumn;
    if (kind == 2 && shape.size() > 1) parameter.cut = Cut::kRow;
    if (kind == 3) {
      parameter.cut = Cut::kParts;
      const int64_t first = draw(0, static_cast<int>(std::min<int64_t>(shape[0], 100)));
      parameter.parts = {first, shape[0] - first};
    }
  }
}

// A pipeline's tensor-parallel ranks have equal shares: the axes are made to divide. The numbers of
// ranks that they divide by.
std::vector<int> draw_equal_cuts(Model* model) {
  using reference::Cut;
  model->heads = 0;
  model->grain = 1;
  const int most = draw_from(std::vector<int>{2, 3, 4});
  for (ModelParameter& parameter : model->parameters) {
    if (parameter.cut == Cut::kWhole) continue;
    parameter.zeros = false;
    int64_t& axis = parameter.shape[parameter.cut == Cut::kRow ? 1 : 0];
    axis = most * draw(1, 2);
    if (parameter.cut != Cut::kParts) continue;
    parameter.parts = {axis, int64_t{most} * draw(1, 2)};
    axis = parameter.parts[0] + parameter.parts[1];
  }
  if (most == 4) return {1, 2, 4};
  return {1, most};
}

// One in four models is a PipelineModule: the first parameter may be tied to a head, the others lie
// in layers of one or several, all in one group (a stage must hold one of each).
void make_pipeline(Case* value) {
  Model& model = value->model;
  const bool tied = one_in(2);
  int layer = tied ? 1 : 0;
  std::set<int> owned;  // layers that hold a parameter of the optimizer
  bool open = false;    // the layer has a parameter
  for (size_t i = 0; i < model.parameters.size(); ++i) {
    ModelParameter& parameter = model.parameters[i];
    parameter.alias.clear();
    parameter.group = std::min(parameter.group, 0);
    if (tied && i == 0) {
      parameter.name = "tied_modules.k." + parameter.name;
      continue;
    }
    if (open && !one_in(3)) ++layer;
    open = true;
    parameter.name = std::to_string(layer) + "." + parameter.name;
    parameter.layers = {layer};
    if (model.owned(i)) owned.insert(layer);
  }
  model.layers = layer + 2;  // the last one has no file
  if (tied) model.parameters[0].layers = {0, model.layers - 1};
  if (tied) model.buffers.clear();
  for (size_t i = 0; i < model.buffers.size(); ++i)
    model.buffers[i].name =
        std::to_string(model.parameters[i].layers[0]) + "." + model.buffers[i].name;
  model.reversed = false;
  model.callers_splits = one_in(2);
  const std::vector<int> tensors =
      model.callers_splits ? draw_equal_cuts(&model) : std::vector<int>{1};
  for (Job* job : {&value->a, &value->b, &value->c})
    *job = {.data = std::min(job->data, 4),
            .stage = 1,
            .tensor = draw_from(tensors),
            .pipeline = draw(1, std::clamp(static_cast<int>(owned.size()), 1, 4))};
}

// A dynamic loss scaler does not fit into stage 0.
void finish(Case* value) {
  draw_cuts(&value->model);
  value->choice = static_cast<uint64_t>(draw(0, 1'000'000));
  for (Job* job : {&value->b, &value->c}) {
    if (value->model.dynamic_scale && job->stage == 0) job->stage = 1;
  }
}

}  // namespace

rc::Gen<Case> any_case() {
  return rc::gen::exec([] {
    Case value{.model = draw_settings(), .a = draw_job(1), .b = draw_job(0), .c = draw_job(0)};
    draw_parameters(&value, 6);
    draw_optimizer(&value.model);
    finish(&value);
    if (one_in(4)) make_pipeline(&value);
    return value;
  });
}

rc::Gen<Case> any_expert_case() {
  return rc::gen::exec([] {
    Case value{.model = draw_settings(), .a = {}, .b = {}, .c = {}};
    Model& model = value.model;
    model.reversed = model.round_robin = model.bf16_optimizer = model.dynamic_scale = false;
    model.data_first = one_in(2);
    const auto job = [](int stage) {
      const int expert = draw(1, 4);
      Job made{.data = expert * draw(1, 3), .stage = stage, .expert = expert};
      if (stage > 0 && stage < 3 && one_in(4)) made.sequence = 2;  // DeepSpeed has none at 3
      return made;
    };
    model.autoep = one_in(2);
    if (one_in(3)) model.most = draw(1, 40);  // of equal shares alone
    const int last_stage = model.autoep ? 3 : 2;
    value.a = job(0);
    value.b = job(draw(0, last_stage));
    value.c = job(draw(0, last_stage));
    const int most = std::max({value.a.expert, value.b.expert, value.c.expert});
    const int experts = std::lcm(std::lcm(value.a.expert, value.b.expert), value.c.expert);
    std::vector<ModelParameter> dense, all;
    const int layers = draw(1, 2);
    for (int layer = 0; layer < layers; ++layer) {
      if (model.autoep) {  // any number of experts that leaves no rank without one
        const std::string mlp = "m" + std::to_string(layer) + ".mlp.";
        dense.push_back({.name = "d" + std::to_string(layer), .shape = {draw(1, 7), draw(1, 3)}});
        // Like no other: DeepSpeed lists routers in either of two orders.
        dense.push_back({.name = mlp + "router.gate.weight", .shape = {draw(1, 5), 1, 1, 1}});
        // Where they do not divide, sub-groups must not end amid them: refused.
        if (model.most == 0) model.sub_group_size = 1'000'000'000;
        model.experts.push_back(model.most > 0 ? experts * draw(1, 2) : draw(most, most + 5));
        const Shape up = {model.experts.back(), draw(1, 4), draw(1, 5)};
        for (const char* stack : {"w1", "w2", "w3"})
          all.push_back({.name = mlp + "experts." + stack,
                         .shape = stack[1] == '2' ? Shape{up[0], up[2], up[1]} : up,
                         .group = 1});
        continue;
      }
      const std::string path = "m" + std::to_string(layer) + ".deepspeed_moe.";
      dense.push_back({.name = "d" + std::to_string(layer), .shape = {draw(1, 7), draw(1, 3)}});
      dense.push_back({.name = path + "gate.wg.weight", .shape = {draw(1, 5)}});
      model.experts.push_back(experts * draw(1, 2));
      const Shape weight = {draw(1, 4), draw(1, 5)}, bias = {draw(1, 9)};
      for (int number = 0; number < model.experts.back(); ++number) {
        const std::string front = path + "experts.deepspeed_experts." + std::to_string(number);
        all.push_back({.name = front + ".a.weight", .shape = weight, .group = 1});
        all.push_back({.name = front + ".a.bias", .shape = bias, .group = 1});
      }
    }
    dense.push_back({.name = "head", .shape = {draw(1, 6)}});
    model.parameters = dense;
    model.parameters.insert(model.parameters.end(), all.begin(), all.end());
    draw_optimizer(&model);
    if ((model.autoep || model.most > 0) && model.states.empty())
      model.states.push_back({"sum", DType::kFloat32});  // or nothing tells a slot's shape
    value.choice = static_cast<uint64_t>(draw(0, 1'000));
    return value;
  });
}

rc::Gen<Case> case_of_many_ranks() {
  return rc::gen::exec([] {
    const std::vector<int> ranks = {9, 10, 11, 9, 10, 11, 99, 100, 101};
    Case value{.model = draw_settings()};
    value.a = {.data = draw_from(ranks), .stage = draw(1, 3)};
    value.b = {.data = draw_from(ranks), .stage = draw(1, 3)};
    value.c = {.data = 10, .stage = draw(1, 3)};
    draw_parameters(&value, 3);
    draw_optimizer(&value.model);
    finish(&value);
    return value;
  });
}

}  // namespace isoshard::properties
