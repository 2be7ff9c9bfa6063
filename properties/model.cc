// See model.h.
#include "properties/model.h"

#include <algorithm>
#include <ostream>
#include <span>

#include "core/cast.h"
#include "core/error.h"
#include "core/random.h"

namespace isoshard::properties {
namespace {

constexpr uint64_t kFrozen = 100, kBuffer = 101;  // beside the states −1, 0, 1, …

// Bits that trouble code which computes where it should move: NaNs with payloads, −0, denormals.
uint32_t troublesome(uint64_t word, DType dtype) {
  constexpr uint32_t kSingle[] = {0x7F800001, 0xFFBFFFFF, 0x7FC12345, 0x80000000,
                                  0x00000001, 0x807FFFFF, 0x7F800000, 0x00000000};
  constexpr uint32_t kBrain[] = {0x7F81, 0xFFBF, 0x7FC1, 0x8000, 0x0001, 0x807F, 0x7F80, 0x0000};
  constexpr uint32_t kHalf[] = {0x7C01, 0xFDFF, 0x7E12, 0x8000, 0x0001, 0x83FF, 0x7C00, 0x0000};
  const auto& table = dtype == DType::kFloat32    ? kSingle
                      : dtype == DType::kBFloat16 ? kBrain
                                                  : kHalf;
  return table[word % std::size(table)];
}

struct Coordinates {
  uint64_t tensor = 0;
  uint64_t kind = 0;
  uint64_t index = 0;
};

uint32_t value_bits(const Model& model, const Coordinates& at, DType dtype) {
  const uint64_t word = keyed_random(model.seed, {at.tensor, at.kind, at.index});
  if ((word >> 40) % 8 == 0) return troublesome(word, dtype);
  uint32_t bits = static_cast<uint32_t>(word);
  if (item_size_bytes(dtype) == 2) bits &= 0xFFFF;
  return bits == poison(dtype) ? bits ^ 1 : bits;
}

void flip_bit(const Flip& flip, int64_t item_bits, reference::Bits* bits) {
  if (bits->empty()) return;
  const int64_t bit = flip.bit % (static_cast<int64_t>(bits->size()) * item_bits);
  (*bits)[static_cast<size_t>(bit / item_bits)] ^= uint32_t{1} << (bit % item_bits);
}

uint64_t kind_of(int state) { return static_cast<uint64_t>(state + 1); }

}  // namespace

std::ostream& operator<<(std::ostream& out, const Job& job) {
  return out << "dp=" << job.data << ",sp=" << job.sequence << ",tp=" << job.tensor
             << ",pp=" << job.pipeline << ",ep=" << job.expert << ",stage=" << job.stage;
}

std::ostream& operator<<(std::ostream& out, const Model& model) {
  out << "seed " << model.seed << ", " << name(model.dtype) << (model.reversed ? ", reversed" : "")
      << (model.round_robin ? ", round robin" : "") << (model.aligned ? ", aligned" : "")
      << (model.bf16_optimizer ? ", BF16_Optimizer" : "")
      << (model.dynamic_scale ? ", dynamic scale" : "")
      << (model.client_state ? ", client state" : "") << (model.maps ? "" : ", no maps")
      << (model.callers_splits ? ", caller's splits" : "") << ", most " << model.most << ", heads "
      << model.heads << ", grain " << model.grain << ", layers " << model.layers
      << ", sub_group_size " << model.sub_group_size << "\n";
  for (const ModelParameter& parameter : model.parameters) {
    out << "  " << quote(parameter.name) << " " << to_string(parameter.shape) << " group "
        << parameter.group << (parameter.zeros ? " zeros" : "") << " cut "
        << static_cast<int>(parameter.cut);
    for (int64_t rows : parameter.parts) out << " " << rows;
    if (!parameter.alias.empty()) out << " alias " << quote(parameter.alias);
    out << "\n";
  }
  for (const ModelBuffer& buffer : model.buffers) {
    out << "  buffer " << quote(buffer.name) << " " << name(buffer.dtype) << " "
        << to_string(buffer.shape) << "\n";
  }
  for (const StateKind& state : model.states) {
    out << "  state " << state.name << " " << name(state.dtype) << "\n";
  }
  for (const ScalarKind& scalar : model.scalars) {
    out << "  scalar " << scalar.name << " form " << static_cast<int>(scalar.form) << "\n";
  }
  return out;
}

std::vector<std::vector<int>> optimizer_groups(const Model& model) {
  std::vector<std::vector<int>> groups;
  for (size_t i = 0; i < model.parameters.size(); ++i) {
    if (!model.owned(i)) continue;
    const size_t group = static_cast<size_t>(model.parameters[i].group);
    if (groups.size() <= group) groups.resize(group + 1);
    std::vector<int>& members = groups[group];
    members.insert(model.reversed ? members.begin() : members.end(), static_cast<int>(i));
  }
  std::erase_if(groups, [](const std::vector<int>& members) { return members.empty(); });
  return groups;
}

reference::GroupSizes group_sizes(const Model& model) {
  reference::GroupSizes sizes;
  for (const std::vector<int>& members : optimizer_groups(model)) {
    sizes.emplace_back();
    for (int number : members) {
      sizes.back().push_back(numel(model.parameters[static_cast<size_t>(number)].shape));
    }
  }
  return sizes;
}

bool uses_bf16_optimizer(const Model& model, int stage) {
  return model.bf16_optimizer && model.dtype == DType::kBFloat16 && stage == 1;
}

reference::Form form_of(const Model& model, const Job& job) {
  const bool flat = (job.stage == 1 || job.stage == 2) && !uses_bf16_optimizer(model, job.stage);
  return {.stage = job.stage,
          .ranks = job.ranks(),
          .round_robin = flat && model.round_robin,
          .align_elements = flat && model.aligned ? 16 / item_size_bytes(model.dtype) : 1,
          .sub_group_size = model.sub_group_size};
}

uint32_t poison(DType dtype) {
  if (dtype == DType::kFloat32) return 0x7FA5C0DE;
  return dtype == DType::kBFloat16 ? 0x7FA5 : 0x7D05;
}

DType state_dtype(const Model& model, int state) {
  return state < 0 ? DType::kFloat32 : model.states[static_cast<size_t>(state)].dtype;
}

reference::CutRule rule_of(const Model& model, size_t number) {
  const ModelParameter& parameter = model.parameters[number];
  reference::CutRule rule{parameter.cut, parameter.parts, model.heads, model.grain};
  for (const char* part : {"mlp", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}) {
    if (parameter.name.find(part) != std::string::npos) rule.heads = 0;
  }
  return rule;
}

std::vector<int> parts_of(const Model& model, int stages) {
  std::vector<int> owned;  // layers, of which a stage may begin at each
  for (size_t i = 0; i < model.parameters.size(); ++i) {
    const std::vector<int>& layers = model.parameters[i].layers;
    if (model.owned(i) && layers.size() == 1 && (owned.empty() || owned.back() != layers[0]))
      owned.push_back(layers[0]);
  }
  std::vector<int> parts = {0};
  for (int stage = 1; stage < stages; ++stage)
    parts.push_back(owned[owned.size() * static_cast<size_t>(stage) / static_cast<size_t>(stages)]);
  parts.push_back(model.layers);
  return parts;
}

namespace {

bool is_on(const Model& part, const std::vector<int>& layers) {
  return std::ranges::any_of(
      layers, [&](int layer) { return layer >= part.stage.first && layer < part.stage.second; });
}

// Parameters of other stages have no element here.
Model stage_of(const Model& model, const std::vector<int>& parts, int stage) {
  Model result = model;
  result.stage = {parts[static_cast<size_t>(stage)], parts[static_cast<size_t>(stage) + 1]};
  for (ModelParameter& parameter : result.parameters) {
    if (is_on(result, parameter.layers)) continue;
    if (!parameter.whole) parameter.whole = parameter.shape;
    parameter.shape = {0};
  }
  return result;
}

}  // namespace

std::vector<std::string> buffers_on(const Model& part) {
  std::vector<std::string> names;
  for (size_t i = 0; i < part.buffers.size(); ++i) {
    if (part.layers == 0 || is_on(part, part.parameters[i].layers))
      names.push_back(part.buffers[i].name);
  }
  return names;
}

Model part_of(const Model& model, const Job& job, int mp) {
  Model result = shard_of(model, mp % job.tensor, job.tensor);
  if (model.layers > 0) result = stage_of(result, parts_of(model, job.pipeline), mp / job.tensor);
  result.mp_rank = mp;
  return result;
}

namespace {
std::string two(int number) { return (number < 10 ? "0" : "") + std::to_string(number); }
}  // namespace

std::string mp_name(const Model& part) { return "mp_rank_" + two(part.mp_rank); }

std::string layer_name(const Model& shard, int layer) {
  const std::string rank = shard.callers_splits ? "model_" + two(shard.tensor_rank) + "-" : "";
  return "layer_" + two(layer) + "-" + rank + "model_states.pt";
}

std::vector<LayerEntry> entries_of(const Model& model, int layer) {
  std::vector<LayerEntry> entries;
  for (size_t i = 0; i < model.parameters.size(); ++i) {
    const ModelParameter& parameter = model.parameters[i];
    if (parameter.layers[0] != layer) continue;  // a tied one's second use has no file
    const size_t start = parameter.layers.size() > 1 ? std::string("tied_modules.k.").size()
                                                     : parameter.name.find('.') + 1;
    entries.push_back({parameter.name.substr(start), i});
    if (i >= model.buffers.size()) continue;
    const std::string& name = model.buffers[i].name;
    entries.push_back({name.substr(name.find('.') + 1), i, /*buffer=*/true});
  }
  return entries;
}

Model shard_of(const Model& model, int rank, int ranks) {
  Model result = model;
  if (ranks == 1) return result;
  result.mp_rank = result.tensor_rank = rank;
  result.tensor_ranks = ranks;
  for (size_t i = 0; i < model.parameters.size(); ++i) {
    ModelParameter& parameter = result.parameters[i];
    parameter.whole = parameter.shape;
    parameter.shape = reference::shard_shape(rule_of(model, i), parameter.shape, rank, ranks);
  }
  return result;
}

namespace {

const Shape& whole_shape(const ModelParameter& parameter) {
  return parameter.whole ? *parameter.whole : parameter.shape;
}

// This rank's elements.
reference::Bits held(const Model& model, size_t number, const reference::Bits& whole) {
  if (model.tensor_ranks == 1) return whole;
  return reference::shard(rule_of(model, number), whole_shape(model.parameters[number]), whole,
                          model.tensor_rank, model.tensor_ranks);
}

}  // namespace

reference::Bits state_bits(const Model& model, int parameter, int state) {
  const ModelParameter& owner = model.parameters[static_cast<size_t>(parameter)];
  const DType dtype = state_dtype(model, state);
  reference::Bits bits(static_cast<size_t>(numel(whole_shape(owner))), 0);
  for (size_t i = 0; i < bits.size(); ++i) {
    if (owner.zeros && i % 1900 != 3) continue;
    bits[i] = value_bits(model, {static_cast<uint64_t>(parameter), kind_of(state), i}, dtype);
  }
  const bool here =
      model.flip.tensor == parameter &&
      (state < 0 ? model.flip.where == Flip::Where::kMaster
                 : model.flip.where == Flip::Where::kState && model.flip.state == state);
  if (here) flip_bit(model.flip, 8 * item_size_bytes(dtype), &bits);
  return held(model, static_cast<size_t>(parameter), bits);
}

reference::Groups whole_state(const Model& model, int state) {
  reference::Groups whole;
  for (const std::vector<int>& members : optimizer_groups(model)) {
    whole.emplace_back();
    for (int number : members) whole.back().push_back(state_bits(model, number, state));
  }
  return whole;
}

std::string pack(const reference::Bits& bits, DType dtype) {
  const size_t item = static_cast<size_t>(item_size_bytes(dtype));
  std::string bytes(bits.size() * item, '\0');
  for (size_t i = 0; i < bits.size(); ++i) {
    for (size_t b = 0; b < item; ++b) bytes[i * item + b] = static_cast<char>(bits[i] >> (8 * b));
  }
  return bytes;
}

std::string module_bytes(const Model& model, size_t number) {
  const int parameter = static_cast<int>(number);
  const int64_t count = numel(model.parameters[number].shape);
  if (!model.owned(number)) {
    const int64_t all = numel(whole_shape(model.parameters[number]));
    reference::Bits bits(static_cast<size_t>(all));
    for (size_t i = 0; i < bits.size(); ++i) {
      bits[i] = value_bits(model, {number, kFrozen, i}, model.dtype);
    }
    if (model.flip.where == Flip::Where::kFrozen && model.flip.tensor == parameter) {
      flip_bit(model.flip, 8 * item_size_bytes(model.dtype), &bits);
    }
    return pack(held(model, number, bits), model.dtype);
  }
  const std::string masters = pack(state_bits(model, parameter, -1), DType::kFloat32);
  std::string bytes(static_cast<size_t>(count * item_size_bytes(model.dtype)), '\0');
  cast(DType::kFloat32, std::as_bytes(std::span(masters)), model.dtype,
       std::as_writable_bytes(std::span(bytes)));
  return bytes;
}

namespace {

// Random bytes are poison once in 65,536 elements of two bytes.
void replace_poison(DType dtype, std::string* bytes) {
  if (dtype != DType::kFloat32 && dtype != DType::kBFloat16 && dtype != DType::kFloat16) return;
  const std::string pattern = pack({poison(dtype)}, dtype);
  for (size_t at = 0; at < bytes->size(); at += pattern.size()) {
    if (bytes->compare(at, pattern.size(), pattern) == 0) (*bytes)[at] ^= 1;
  }
}

}  // namespace

std::string buffer_bytes(const Model& model, size_t number) {
  const ModelBuffer& buffer = model.buffers[number];
  std::string bytes(static_cast<size_t>(numel(buffer.shape) * item_size_bytes(buffer.dtype)), '\0');
  for (size_t i = 0; i < bytes.size(); ++i) {
    const uint64_t word = keyed_random(model.seed, {number, kBuffer, i});
    bytes[i] = static_cast<char>(buffer.dtype == DType::kBool ? word & 1 : word);
  }
  replace_poison(buffer.dtype, &bytes);
  if (model.flip.where == Flip::Where::kBuffer && model.flip.tensor == static_cast<int>(number) &&
      !bytes.empty()) {
    const size_t bit = static_cast<size_t>(model.flip.bit) % (8 * bytes.size());
    bytes[bit / 8] = static_cast<char>(bytes[bit / 8] ^ (1 << (bit % 8)));
  }
  return bytes;
}

std::string scalar_value_text(const ScalarKind& scalar, int group) {
  if (scalar.form == ScalarKind::Form::kNone) return "None";
  return std::to_string(scalar.value + group);
}

}  // namespace isoshard::properties
