// A universal folder (deepspeed/checkpoint/ds_to_universal.py): one folder a parameter under zero/,
// one file a state; the model files are byte copies of the source's.
#include <algorithm>
#include <map>
#include <set>

#include "checkpoint/deepspeed/merge.h"
#include "checkpoint/deepspeed/names.h"
#include "checkpoint/deepspeed/reader.h"
#include "checkpoint/deepspeed/universal_states.h"
#include "checkpoint/deepspeed/zero_files.h"
#include "core/error.h"
#include "core/zero_rules.h"

namespace isoshard::checkpoint {
namespace {

class UniversalReader {
 public:
  UniversalReader(ShardedState* state, Storage& storage, const ReadOptions& options)
      : state_(*state), storage_(storage), options_(options) {}

  void run() {
    open_model_files();
    ModelStates model = read_model_states(state_, state_.model_files[0]);
    state_.version = model.version;
    const auto mp_ranks = static_cast<int>(files_of_mp_.size());
    if (!model.has_degrees && model.module.empty()) count_degrees(&model);
    set_topology(&state_, model, mp_ranks, options_.sequence_degree);
    check_mp_ranks();
    if (!model.has_param_shapes) {
      missing("The model file records no parameter shapes.", "param_shapes",
              "convert the original checkpoint again with isoshard");
    }
    open_zero_folder();
    state_.stage = stage3_ ? 3 : read_stage();
    const Fields fields(state_.document(model.file));
    const TensorParallelInfo info(fields, model.file,
                                  fields.maybe(fields.root(), "universal_checkpoint_info"));
    const bool parts = state_.topology.tensor > 1 || (!stage3_ && info.says_anything());
    const bool stages = state_.topology.pipeline > 1;
    if (stages)
      read_stages(info);
    else if (parts)
      read_parts(info);
    else
      add_shapes(model, &state_);
    const ExpertInfo experts(state_, model);
    if (experts.autoep()) stack_experts(experts);
    if (experts.present()) give_expert_dtype(&state_, model, experts);
    if (experts.present())
      state_.expert_layout = experts.autoep() ? ExpertLayout::kAutoEp : ExpertLayout::kNative;
    for (ParameterState& parameter : state_.parameters) {
      if (parameter.group >= 0) attach_states(&parameter);
    }
    read_groups(model);
    if (stage3_) add_nested_scalars();
    if (!parts && !stages) {
      add_frozen(&state_, model);
      add_module_entries(&state_, experts.with_router_aliases(state_, model));
    }
    for (auto& [name, files] : folders_) add_copy(name, files);
    if (parts || (stages && info.says_anything()))
      tell_unused_patterns(&state_, info, options_.strict);
    check_universal_states(&state_, storage_, options_);
  }

 private:
  [[noreturn]] void missing(const std::string& what, const std::string& entry,
                            const std::string& next) const {
    throw Error(ErrorInfo{.code = ErrorCode::kIncomplete,
                          .what = what,
                          .file = state_.folder,
                          .entry = entry,
                          .next = next});
  }
  Fields global() const { return Fields(state_.document(state_.optim_files[0])); }

  void open_model_files();
  void count_degrees(ModelStates* model) const;
  void open_zero_folder();
  int read_stage() const;
  void check_mp_ranks() const;
  void add_shapes(const ModelStates& model, ShardedState* state) const;
  void read_parts(const TensorParallelInfo& info);
  void read_stages(const TensorParallelInfo& info);
  void stack_experts(const ExpertInfo& experts);
  void attach_states(ParameterState* parameter);
  void check_experts(const Fields& fields, const ParameterState& parameter,
                     const std::string& file) const;
  TensorView tensor_of(const Fields& fields, const std::string& what) const;
  void read_groups(const ModelStates& model);
  void add_nested_scalars();
  void add_frozen(ShardedState* state, const ModelStates& model) const;
  void add_copy(const std::string& name, const std::map<std::string, int>& files);

  ShardedState& state_;
  Storage& storage_;
  const ReadOptions& options_;
  bool stage3_ = false;
  std::map<int, std::vector<int>> files_of_mp_;                // model files by mp rank
  std::map<std::string, std::map<std::string, int>> folders_;  // parameter → state → file
};

// An older pipeline does not record its degrees: the tensor-parallel ranks of a stage name the same
// parameters, those of two stages do not.
void UniversalReader::count_degrees(ModelStates* model) const {
  const auto names = [](const ModelStates& of) {
    std::vector<std::string> result;
    for (const NamedShapes& group : of.param_shapes) {
      for (const auto& [name, shape] : group) result.push_back(name);
    }
    return result;
  };
  const auto mp_ranks = static_cast<int64_t>(files_of_mp_.size());
  int64_t tensor = 1;
  for (const auto& [mp, files] : files_of_mp_) {
    if (mp != tensor) continue;
    if (names(read_model_states(state_, files[0])) != names(*model)) break;
    ++tensor;
  }
  model->tp_degree = mp_ranks % tensor == 0 ? tensor : 1;
  model->pp_degree = mp_ranks / model->tp_degree;
  model->has_degrees = true;
}

void UniversalReader::open_model_files() {
  std::map<std::pair<int, int>, std::string> plain, ranked;  // by mp rank, partition rank
  for (const DirectoryEntry& entry : storage_.list(state_.folder)) {
    const FileName name = parse_file_name(entry.name);
    if (name.kind == FileName::Kind::kModel) plain[{name.mp, 0}] = entry.name;
    if (name.kind == FileName::Kind::kModelOfRank) ranked[{name.mp, name.dp}] = entry.name;
    if (name.kind == FileName::Kind::kLayer || name.kind == FileName::Kind::kExpert) {
      throw Error(ErrorInfo{.code = ErrorCode::kMismatch,
                            .what = "A file of another form lies in a universal folder.",
                            .file = join(state_.folder, entry.name)});
    }
  }
  stage3_ = plain.empty();
  const std::map<std::pair<int, int>, std::string>& files = stage3_ ? ranked : plain;
  if (files.empty() || files.begin()->first != std::pair(0, 0))
    missing("The universal folder has no model file of rank 0.", "mp_rank_00_model_states.pt",
            "copy it from the source checkpoint");
  std::vector<std::string> names;
  for (const auto& [rank, name] : files) names.push_back(name);
  state_.flavour = stage3_ ? Flavour::kUniversal3 : Flavour::kUniversal12;
  state_.model_files = open_files(&state_, storage_, names, options_);
  size_t next = 0;
  for (const auto& [rank, name] : files)
    files_of_mp_[rank.first].push_back(state_.model_files[next++]);
}

void UniversalReader::check_mp_ranks() const {
  const int expected = state_.topology.tensor * state_.topology.pipeline;
  if (static_cast<int>(files_of_mp_.size()) == expected &&
      files_of_mp_.rbegin()->first == expected - 1)
    return;
  missing("The model files are not those of all mp ranks.",
          std::to_string(expected) + " mp ranks, found " + std::to_string(files_of_mp_.size()),
          "copy them from the source checkpoint");
}

// Trained parameters without leaves; `group`, at stage 3 `sub_group`, is the number of their entry
// in param_shapes.
void UniversalReader::add_shapes(const ModelStates& model, ShardedState* state) const {
  for (size_t i = 0; i < model.param_shapes.size(); ++i) {
    for (const auto& [name, shape] : model.param_shapes[i]) {
      state->parameters.push_back({.name = name,
                                   .shape = shape,
                                   .group = stage3_ ? 0 : static_cast<int>(i),
                                   .sub_group = stage3_ ? static_cast<int>(i) : -1,
                                   .states = {},
                                   .scalars = {}});
    }
  }
}

// Names and shapes of every pipeline stage; the layers' own files are not part of this form.
void UniversalReader::read_stages(const TensorParallelInfo& info) {
  if (stage3_) {
    throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                          .what = "Pipeline stages at stage 3 are not supported.",
                          .file = state_.folder});
  }
  std::vector<MpPart> parts;
  for (int rank = 0; rank < state_.topology.tensor; ++rank) {
    MpPart part = lend_files(&state_);
    part.state.flavour = state_.flavour;
    part.state.stage = state_.stage;
    for (int stage = 0; stage < state_.topology.pipeline; ++stage) {
      const int file = files_of_mp_.at(stage * state_.topology.tensor + rank)[0];
      const ModelStates model = read_model_states(part.state, file);
      if (stage == 0) part.model = model;
      ShardedState shapes;
      add_shapes(model, &shapes);
      for (const ParameterState& parameter : shapes.parameters) {
        const ParameterState* known = part.state.find_parameter(parameter.name);
        if (known == nullptr)
          part.state.parameters.push_back(parameter);
        else if (known->shape != parameter.shape)
          part.state.refuse(ErrorCode::kMismatch,
                            "Pipeline replicas of a parameter disagree (DeepSpeed: "
                            "AssertionError).",
                            quote(parameter.name), to_string(known->shape),
                            to_string(parameter.shape), "put the files of one save together");
      }
    }
    state_.files = std::move(part.state.files);
    parts.push_back(std::move(part));
  }
  if (parts.size() == 1 && !info.says_anything())
    state_.parameters = std::move(parts[0].state.parameters);
  else
    merge_tensor_ranks(&state_, parts, info);
}

// param_shapes has one rank's experts; under zero/ lie all of them. No file holds copies.
void UniversalReader::stack_experts(const ExpertInfo& experts) {
  state_.topology.expert = static_cast<int>(experts.layers()[0].ep_size);
  for (ParameterState& parameter : state_.parameters) {
    const ExpertLayer* layer = experts.layer_of(parameter.name);
    if (layer == nullptr) continue;
    parameter.split = static_cast<int>(state_.splits.size());
    state_.splits.push_back(
        experts.split_of(parameter.name, experts.shards_of(*layer, parameter.shape)));
    parameter.shape = logical_shape(state_.splits.back());
  }
}

// The model files of every mp rank, joined; the states lie whole under zero/.
void UniversalReader::read_parts(const TensorParallelInfo& info) {
  std::vector<MpPart> parts;
  for (const auto& [mp, numbers] : files_of_mp_) {
    MpPart part = lend_files(&state_);
    part.state.flavour = state_.flavour;
    part.state.stage = state_.stage;
    part.state.model_files = numbers;
    part.model = read_model_states(part.state, numbers[0]);
    add_shapes(part.model, &part.state);
    add_frozen(&part.state, part.model);
    add_module_entries(&part.state, part.model);
    state_.files = std::move(part.state.files);
    parts.push_back(std::move(part));
  }
  merge_tensor_ranks(&state_, parts, info);
}

void UniversalReader::open_zero_folder() {
  const std::string folder = join(state_.folder, "zero");
  if (!storage_.is_file(join(folder, "optimizer_state.pt"))) {
    missing("The universal folder has no global optimizer state.", "zero/optimizer_state.pt",
            "convert the source checkpoint again");
  }
  state_.optim_files = open_files(&state_, storage_, {"zero/optimizer_state.pt"}, options_);
  const std::vector<std::string> names = universal_state_files(storage_, state_.folder);
  const std::vector<int> files = open_files(&state_, storage_, names, options_);
  for (size_t i = 0; i < names.size(); ++i) {
    const std::string inner = names[i].substr(5);
    const size_t slash = inner.rfind('/');
    folders_[inner.substr(0, slash)][inner.substr(slash + 1, inner.size() - slash - 4)] = files[i];
  }
}

int UniversalReader::read_stage() const {
  const Fields f = global();
  const NodeId stage = f.maybe(f.root(), "zero_stage");
  if (stage == kNoNode) return 1;
  return static_cast<int>(f.stage(stage));
}

// The tensor of a state file: a bare tensor, or {…, param: tensor}.
TensorView UniversalReader::tensor_of(const Fields& fields, const std::string& what) const {
  if (const std::optional<TensorView> bare = fields.document().tensor(fields.root())) return *bare;
  return fields.tensor(fields.need(fields.root(), "param"), what);
}

void UniversalReader::attach_states(ParameterState* parameter) {
  const std::string& name = parameter->name;
  const Shape& shape = parameter->shape;
  const bool bare_flat = stage3_ && parameter->split < 0;
  const Shape stored = parameter->split < 0 ? shape : converted_shape(state_.split_of(*parameter));
  const auto found = folders_.find(name);
  if (found == folders_.end() || found->second.count("fp32") == 0) {
    missing("A parameter's folder or its fp32.pt is missing.", "zero/" + name + "/fp32.pt",
            "convert the source checkpoint again");
  }
  const auto add = [&](const std::string& state, int file) {
    const Fields fields(state_.document(file));
    // A tensor state is {…, param: tensor}, or at stage 3 a bare flat tensor; all else is a number.
    const std::optional<TensorView> bare = fields.document().tensor(fields.root());
    const bool tensor =
        fields.pickle().is_mapping(fields.root()) || (stage3_ && bare && bare->shape.size() == 1);
    const TensorView view = tensor ? tensor_of(fields, state) : TensorView{};
    if (tensor && !bare) check_experts(fields, *parameter, "zero/" + name + "/" + state + ".pt");
    if (!tensor && state == "fp32")
      fields.fail("A weight is no tensor.", "zero/" + name + "/fp32.pt", to_string(stored),
                  "no tensor");
    if (!tensor) {
      parameter->scalars.push_back({state, {file, fields.root()}});
      return;
    }
    if (numel(view.shape) != numel(shape) || (!bare_flat && view.shape != stored)) {
      fields.fail("A state's shape differs from the parameter's.",
                  "zero/" + name + "/" + state + ".pt", to_string(stored), to_string(view.shape));
    }
    const int leaf = state_.add_leaf({.name = name,
                                      .state = state,
                                      .dtype = view.dtype,
                                      .shape = shape,
                                      .requires_grad = view.requires_grad,
                                      .fragments = file_fragments(fields.document(), file, view)});
    if (state == "fp32") {
      parameter->weight = leaf;
    } else {
      parameter->states.push_back(leaf);
      state_.stepped = true;
    }
  };
  add("fp32", found->second.at("fp32"));
  for (const auto& [state, file] : found->second) {
    if (state == "step") add(state, file);
  }
  for (const auto& [state, file] : found->second) {
    if (state != "fp32" && state != "step") add(state, file);
  }
  folders_.erase(found);
}

// What a file says of its stack must fit the model's layers: at ep 1 the whole stack is taken.
void UniversalReader::check_experts(const Fields& fields, const ParameterState& parameter,
                                    const std::string& file) const {
  const bool stack = parameter.split >= 0 && state_.split_of(parameter).kind == SplitKind::kExperts;
  const NodeId count = fields.maybe(fields.root(), "ep_num_experts");
  const bool marked = fields.maybe(fields.root(), "is_expert_param") != kNoNode;
  const std::string expected =
      stack ? std::to_string(parameter.shape.at(0)) + " experts" : "no experts";
  if (!stack && marked)
    fields.fail("A file holds experts of a layer that the model's files do not name.", file,
                expected, "is_expert_param");
  if (!stack || count == kNoNode) return;
  const int64_t found = fields.integer(count, "ep_num_experts");
  if (found != parameter.shape.at(0))
    fields.fail(
        "The number of experts in a file is not that of the model's layer (DeepSpeed: "
        "AssertionError).",
        file, expected, std::to_string(found));
}

void UniversalReader::read_groups(const ModelStates& model) {
  const Fields f = global();
  const std::vector<NodeId>& hypers = f.list(f.need(f.root(), "param_groups"), "param_groups");
  std::vector<int> group_of(model.param_shapes.size());
  for (size_t i = 0; i < group_of.size(); ++i) group_of[i] = static_cast<int>(i);
  if (stage3_) {
    for (size_t g = 0; g < hypers.size(); ++g) {
      for (NodeId item : f.list(f.need(hypers[g], "params"), "params")) {
        const int64_t k = f.integer(item, "params");
        if (k < 0 || k >= static_cast<int64_t>(group_of.size()))
          f.fail("A param group names a sub-group that is not there.", "param_groups",
                 "below " + std::to_string(group_of.size()), std::to_string(k));
        group_of[static_cast<size_t>(k)] = static_cast<int>(g);
      }
    }
  } else if (hypers.size() != model.param_shapes.size()) {
    f.fail("The number of param_groups differs from param_shapes.", "param_groups",
           std::to_string(model.param_shapes.size()), std::to_string(hypers.size()));
  }
  for (NodeId hyper : hypers) state_.groups.push_back({{state_.optim_files[0], hyper}, {}, {}});
  for (size_t i = 0; i < state_.parameters.size(); ++i) {
    ParameterState& parameter = state_.parameters[i];
    if (parameter.group < 0) continue;  // frozen
    const int entry = stage3_ ? parameter.sub_group : parameter.group;
    parameter.group = group_of[static_cast<size_t>(entry)];
    GroupState& group = state_.groups[static_cast<size_t>(parameter.group)];
    group.flat_order.push_back(static_cast<int>(i));
    group.parameters.push_back(static_cast<int>(i));
  }
  const Fields m(state_.document(model.file));
  // BF16_Optimizer, whose state names no stage, never permutes.
  const bool permuted = f.maybe(f.root(), "zero_stage") != kNoNode;
  if (stage3_ || !permuted || zero_option(m, model.config, "round_robin_gradients", 0) == 0) return;
  state_.round_robin = true;
  if (state_.expert_layout != ExpertLayout::kNone) {
    throw Error(ErrorInfo{
        .code = ErrorCode::kUnsupported,
        .what = "A universal form of experts under round_robin_gradients is not supported yet.",
        .file = state_.folder,
        .entry = "round_robin_gradients",
        .next = "reshard the original checkpoint instead"});
  }
  for (GroupState& group : state_.groups) {
    const std::vector<int> order = round_robin_order(static_cast<int>(group.flat_order.size()),
                                                     static_cast<int>(model.dp_world));
    for (size_t k = 0; k < order.size(); ++k)
      group.parameters[static_cast<size_t>(order[k])] = group.flat_order[k];
  }
}

// The stage-3 form has no step.pt; rank 0's nested optimizer state holds the steps by sub-group.
void UniversalReader::add_nested_scalars() {
  const Fields f = global();
  const NodeId states = f.need(f.need(f.root(), "optimizer_state_dict"), "state");
  for (ParameterState& parameter : state_.parameters) {
    const NodeId entry = find_index(f.pickle(), states, parameter.sub_group);
    if (entry == kNoNode) continue;
    for (const auto& [key, node] : sort_optimizer_state(f, entry, "state").scalars) {
      parameter.scalars.push_back({key, {state_.optim_files[0], node}});
    }
  }
}

// Stage 3: frozen parameters are slots in the copied model files, one a rank.
void UniversalReader::add_frozen(ShardedState* state, const ModelStates& model) const {
  if (!stage3_) return;
  if (model.frozen_shapes.empty()) return;
  if (static_cast<int64_t>(state->model_files.size()) != model.dp_world) {
    missing("Model files of some ranks are missing; they hold the frozen parameters.",
            std::to_string(model.dp_world) + " files", "copy them from the source checkpoint");
  }
  add_frozen_slots(state, model);
}

// What remains under zero/ restates buffers, frozen parameters and aliases in fp32.
void UniversalReader::add_copy(const std::string& name, const std::map<std::string, int>& files) {
  int original = -1;
  for (const BufferState& buffer : state_.buffers) {
    if (buffer.name == name) original = buffer.leaf;
  }
  for (const Alias& alias : state_.aliases) {
    if (alias.name == name) original = alias.model_copy;
  }
  if (const ParameterState* parameter = state_.find_parameter(name)) original = parameter->weight;
  if (original < 0 || files.size() != 1 || files.begin()->first != "fp32") {
    throw Error(ErrorInfo{.code = ErrorCode::kMismatch,
                          .what = "A folder under zero/ belongs to no parameter of the model.",
                          .file = join(state_.folder, "zero/" + name),
                          .expected = "a name of the model's module",
                          .next = "two checkpoints may be mixed; convert the source again"});
  }
  const int file = files.begin()->second;
  const Fields fields(state_.document(file));
  const TensorView view = tensor_of(fields, "fp32");
  if (view.shape != state_.leaf(original).shape)
    fields.fail("A copy's shape differs from the original's.", quote(name),
                to_string(state_.leaf(original).shape), to_string(view.shape));
  const int copy = state_.add_leaf({.name = name,
                                    .state = "copy",
                                    .dtype = view.dtype,
                                    .shape = view.shape,
                                    .fragments = file_fragments(fields.document(), file, view)});
  state_.copies.emplace_back(original, copy);
}

}  // namespace

void read_universal(ShardedState* state, Storage& storage, const ReadOptions& options) {
  UniversalReader(state, storage, options).run();
}

}  // namespace isoshard::checkpoint
