// See model_states.h.
#include "checkpoint/deepspeed/model_states.h"

#include <algorithm>
#include <map>
#include <set>

#include "core/error.h"
#include "core/mutant.h"

namespace isoshard::checkpoint {
namespace {

[[noreturn]] void unsupported(const Fields& fields, const std::string& what,
                              const std::string& entry) {
  throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                        .what = what,
                        .file = fields.document().path(),
                        .entry = entry,
                        .next = "`isoshard help` lists what this version reads"});
}

std::vector<NamedShapes> read_param_shapes(const Fields& fields, NodeId node) {
  std::vector<NamedShapes> groups;
  for (NodeId group : fields.list(node, "param_shapes")) {
    NamedShapes shapes;
    for (const auto& [name, shape] : fields.named(group, "param_shapes")) {
      shapes.emplace_back(name, fields.shape(shape, "param_shapes " + name));
    }
    groups.push_back(std::move(shapes));
  }
  return groups;
}

void refuse_unsupported(const Fields& fields, const ModelStates& model) {
  if (zero_option(fields, model.config, "mics_shard_size", -1) > 0) {
    unsupported(fields, "MiCS checkpoints are not supported.", "mics_shard_size");
  }
  if (zero_option(fields, model.config, "zero_hpz_partition_size", 1) > 1) {
    unsupported(fields, "Hierarchical partitions (hpZ) are not supported.",
                "zero_hpz_partition_size");
  }
}

}  // namespace

int64_t zero_option(const Fields& fields, NodeId config, const std::string& key,
                    int64_t otherwise) {
  if (config == kNoNode) return otherwise;
  const NodeId zero = fields.maybe(config, "zero_optimization");
  if (zero == kNoNode || !fields.pickle().is_mapping(zero)) return otherwise;
  const NodeId value = fields.maybe(zero, key);
  if (value == kNoNode) return otherwise;
  const Kind kind = fields.pickle().kind(value);
  if (kind == Kind::kFloat) return static_cast<int64_t>(fields.pickle().real_value(value));
  if (kind != Kind::kInt && kind != Kind::kBool) return otherwise;
  return fields.pickle().integer_value(value);
}

ModelStates read_model_states(const ShardedState& state, int file) {
  const Fields fields(state.document(file));
  const NodeId root = fields.root();
  ModelStates model;
  model.file = file;
  model.version = fields.text(fields.need(root, "ds_version"), "ds_version");
  model.config = fields.maybe(root, "ds_config");
  refuse_unsupported(fields, model);
  // None where a pipeline's layers have files of their own.
  if (const NodeId module = fields.maybe(root, "module"); module != kNoNode)
    model.module = fields.named(module, "module");
  for (NodeId name : fields.list(fields.need(root, "buffer_names"), "buffer_names")) {
    model.buffer_names.insert(fields.text(name, "buffer_names"));
  }
  if (const NodeId shapes = fields.maybe(root, "param_shapes"); shapes != kNoNode) {
    model.param_shapes = read_param_shapes(fields, shapes);
    model.has_param_shapes = true;
  }
  if (const NodeId frozen = fields.maybe(root, "frozen_param_shapes"); frozen != kNoNode) {
    for (const auto& [name, shape] : fields.named(frozen, "frozen_param_shapes")) {
      model.frozen_shapes.emplace_back(name, fields.shape(shape, "frozen_param_shapes " + name));
    }
    model.has_frozen_shapes = true;
    model.frozen_fragments = fields.maybe(root, "frozen_param_fragments");
  }
  if (const NodeId shared = fields.maybe(root, "shared_params"); shared != kNoNode) {
    for (const auto& [alias, target] : fields.named(shared, "shared_params")) {
      model.shared.emplace(alias, fields.text(target, "shared_params"));
      model.shared_order.push_back(alias);
    }
  }
  model.dp_world = fields.integer(fields.need(root, "dp_world_size"), "dp_world_size");
  model.mp_world = fields.integer(fields.need(root, "mp_world_size"), "mp_world_size");
  model.global_steps = fields.integer(fields.need(root, "global_steps"), "global_steps");
  const NodeId samples = fields.maybe(root, "global_samples");
  model.samples_are_float = samples != kNoNode && fields.pickle().kind(samples) == Kind::kFloat;
  if (const NodeId degrees = fields.maybe(root, "checkpoint_parallel_dimensions");
      degrees != kNoNode) {
    model.tp_degree = fields.integer(fields.need(degrees, "tp_degree"), "tp_degree");
    model.pp_degree = fields.integer(fields.need(degrees, "pp_degree"), "pp_degree");
    model.has_degrees = true;
  }
  if (model.mp_world < 1 || model.mp_world > 1'000'000) {
    fields.fail("The number of ranks is impossible.", "mp_world_size", "1 or more",
                std::to_string(model.mp_world));
  }
  if (model.tp_degree < 1 || model.pp_degree < 1) {
    fields.fail("The number of ranks is impossible.", "checkpoint_parallel_dimensions", "1 or more",
                "tp_degree " + std::to_string(model.tp_degree) + ", pp_degree " +
                    std::to_string(model.pp_degree));
  }
  if (model.dp_world < 1 || model.dp_world > 10'000'000) {
    fields.fail("The number of ranks is impossible.", "dp_world_size", "1 or more",
                std::to_string(model.dp_world));
  }
  return model;
}

namespace {

// Tied names whose target is a frozen parameter that exclude_frozen_parameters has left out: the
// save removes the first name only (deepspeed/runtime/engine.py, module_state_dict). The first that
// has bytes becomes a frozen parameter of its own, the others its aliases.
class LostTargets {
 public:
  LostTargets(ShardedState* state, const ModelStates& model) : state_(*state) {
    excluded_ = !model.has_frozen_shapes;  // None, or a stage that never writes them
    for (const ParameterState& parameter : state->parameters) names_.insert(parameter.name);
    for (const auto& [name, node] : model.module) names_.insert(name);
  }

  bool is_in_module(const std::string& name) const { return names_.contains(name); }
  bool has(const std::string& target) const { return excluded_ && !names_.contains(target); }

  // Whether the tied name is the one to keep; otherwise it is said where it went.
  bool keeps(const std::string& name, const std::string& target, bool has_bytes) {
    std::string& kept = kept_[target];
    if (!kept.empty()) {
      state_.aliases.push_back({name, kept, -1});
      return false;
    }
    state_.notices.push_back(quote(name) + " is tied to " + quote(target) +
                             ", which is frozen and was excluded from the save" +
                             (has_bytes ? ": it is kept under its own name" : ""));
    if (has_bytes) kept = name;
    if (!has_bytes) state_.skipped.push_back(quote(name) + ": frozen, and excluded from the save");
    return has_bytes;
  }

 private:
  ShardedState& state_;
  bool excluded_ = false;
  std::set<std::string> names_;
  std::map<std::string, std::string> kept_;  // lost target → the name that stands for it
};

}  // namespace

void add_module_entries(ShardedState* state, const ModelStates& model) {
  const TorchFile& document = state->document(model.file);
  const Fields fields(document);
  const bool stage3 = state->flavour == Flavour::kZero3 || state->flavour == Flavour::kUniversal3;
  std::map<std::string, size_t> known;
  for (size_t i = 0; i < state->parameters.size(); ++i) known.emplace(state->parameters[i].name, i);
  std::map<std::string, Shape> frozen_shape(model.frozen_shapes.begin(), model.frozen_shapes.end());
  LostTargets lost(state, model);
  for (const auto& [name, node] : model.module) {
    state->module_order.push_back(name);
    const TensorView view = fields.tensor(node, "module " + name);
    const auto add = [&](const std::string& what) {
      return state->add_leaf(file_leaf(document, model.file, view, name, what));
    };
    if (const auto found = known.find(name); found != known.end()) {
      ParameterState& parameter = state->parameters[found->second];
      parameter.model_dtype = view.dtype;
      if (stage3) continue;  // a placeholder of shape [0]
      if (view.shape != parameter.shape) {
        fields.fail("A parameter has two shapes.", "module " + quote(name),
                    to_string(parameter.shape), to_string(view.shape));
      }
      if (parameter.model_copy < 0) parameter.model_copy = add("param");
    } else if (model.buffer_names.count(name)) {
      state->buffers.push_back({name, add("buffer")});
    } else if (const auto alias = model.shared.find(name);
               alias != model.shared.end() && !lost.has(alias->second)) {
      state->aliases.push_back(
          {name, alias->second, stage3 ? -1 : add("param"), !model.unrecorded.contains(name)});
    } else if (alias != model.shared.end() && !lost.keeps(name, alias->second, !stage3)) {
      continue;
    } else if (!stage3 || frozen_shape.count(name) == 0) {
      // Not owned by the optimizer: frozen, or without elements.
      if (stage3 && numel(view.shape) != 0) {
        fields.fail("A module entry is neither parameter, buffer, alias nor frozen.", quote(name),
                    "known", to_string(view.shape));
      }
      ParameterState frozen{.name = name,
                            .shape = view.shape,
                            .model_dtype = view.dtype,
                            .states = {},
                            .scalars = {}};
      frozen.weight = add("param");
      if (!mutant("frozen_parameter_lost")) state->parameters.push_back(std::move(frozen));
    }
  }
  for (const auto& [alias, target] : model.shared) {
    bool present = false;
    for (const Alias& known_alias : state->aliases) present = present || known_alias.name == alias;
    if (present) continue;
    if (lost.has(target)) {
      if (!lost.is_in_module(alias)) lost.keeps(alias, target, /*has_bytes=*/false);
      continue;
    }
    state->aliases.push_back({alias, target, -1});
  }
}

namespace {

// How many sequence-parallel ranks share a partition group, and why that is thought.
int sequence_degree(ShardedState* state, const ModelStates& model, int mp_ranks, int asked) {
  if (asked > 0) {
    state->topology_evidence = "--sp " + std::to_string(asked);
    return asked;
  }
  if (model.tp_degree <= 1 || model.mp_world != 1 || mp_ranks != 1) return 1;
  if (model.tp_degree > 1'000'000) return 0;  // refused by the caller
  // The Ulysses helper aliases its model-parallel size to the sequence-parallel one.
  state->topology_evidence = "tp_degree is " + std::to_string(model.tp_degree) +
                             " while mp_world_size is 1 and there is one model shard" +
                             (model.samples_are_float ? ", and global_samples is a float" : "") +
                             ": DeepSpeed records the Ulysses sequence degree there";
  return static_cast<int>(model.tp_degree);
}

}  // namespace

void set_topology(ShardedState* state, const ModelStates& model, int mp_ranks, int sequence_asked) {
  const Fields fields(state->document(model.file));
  if (mp_ranks < model.mp_world) {
    throw Error(ErrorInfo{.code = ErrorCode::kMismatch,
                          .what = "Model files of rank " + std::to_string(mp_ranks) +
                                  " and further model-parallel ranks are missing.",
                          .file = fields.document().path(),
                          .entry = "mp_world_size",
                          .expected = std::to_string(model.mp_world) + " model-parallel ranks",
                          .found = "files of " + std::to_string(mp_ranks),
                          .next = "copy the missing files from where they were saved"});
  }
  const int sequence = sequence_degree(state, model, mp_ranks, sequence_asked);
  // Older files do not record the degrees: then every model file is a tensor-parallel rank.
  int64_t tensor = model.has_degrees ? model.tp_degree : mp_ranks;
  if (mp_ranks == 1 && model.mp_world == 1 && !mutant("sequence_taken_for_tensor")) tensor = 1;
  if (tensor < 1 || tensor > 100'000 || sequence < 1 || model.pp_degree < 1 ||
      tensor * model.pp_degree > 1'000'000 || model.pp_degree > 100'000)
    fields.fail("The number of ranks is impossible.", "checkpoint_parallel_dimensions", "1 or more",
                std::to_string(tensor));
  if (model.dp_world % sequence != 0) {
    throw Error(ErrorInfo{.code = ErrorCode::kMismatch,
                          .what = "The sequence degree does not divide the partition group.",
                          .file = fields.document().path(),
                          .entry = "dp_world_size",
                          .expected = "a multiple of " + std::to_string(sequence),
                          .found = std::to_string(model.dp_world),
                          .next = "give the right --sp"});
  }
  state->topology = Topology{
      .data = static_cast<int>(model.dp_world) / (mutant("sequence_counted_twice") ? 1 : sequence),
      .sequence = sequence,
      .tensor = static_cast<int>(tensor),
      .pipeline = static_cast<int>(model.pp_degree)};
  if (!state->topology_evidence.empty()) {
    state->inferred.push_back("sp=" + std::to_string(sequence) + ": " + state->topology_evidence);
  }
}

}  // namespace isoshard::checkpoint
