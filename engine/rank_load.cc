// See rank_load.h.
#include "engine/rank_load.h"

#include <algorithm>
#include <map>
#include <optional>

#include "checkpoint/deepspeed/names.h"
#include "core/cast.h"
#include "core/error.h"
#include "core/mutant.h"
#include "core/numbers.h"
#include "core/zero_rules.h"
#include "engine/expert_files.h"
#include "engine/folding.h"
#include "engine/layer_files.h"
#include "engine/rank_fields.h"
#include "engine/rank_reader.h"

namespace isoshard::engine {
namespace {

using checkpoint::Fields;
using checkpoint::NodeId;

void clear_states(TrainingState* state) {
  for (TrainedGroup& group : state->groups) {
    for (auto& [name, values] : group.states) std::fill(values.begin(), values.end(), 0.0f);
  }
}

// state[number] of an optimizer: its tensors. An optimizer that has never stepped has none.
void load_states(RankReader& reader, NodeId states, int64_t number, int64_t count, int64_t at,
                 TrainedGroup* group) {
  const Fields& fields = reader.fields();
  const std::vector<NodeId>& entries = entries_of(fields, states, "state");
  for (size_t i = 0; i + 1 < entries.size(); i += 2) {
    if (fields.integer(entries[i], "a key of state") != number) continue;
    for (auto& [name, values] : group->states) {
      const std::vector<float> found =
          reader.values(reader.need(entries[i + 1], name), count, "state " + name);
      std::copy(found.begin(), found.end(), values.begin() + at);
    }
    return;
  }
  if (entries.empty()) return;
  fields.fail("The optimizer has no state for a part of the model.", "state",
              "an entry " + std::to_string(number), "none");
}

void load_partitions(RankReader& reader, const RankPlace& place, bool with_states,
                     TrainingState* state) {
  const Fields& fields = reader.fields();
  const bool stage3 = state->stage == 3;
  const NodeId saved = reader.need(fields.root(), "optimizer_state_dict");
  const NodeId masters =
      reader.need(saved, stage3 ? "fp32_flat_groups" : "single_partition_of_fp32_groups");
  const NodeId optimizer =
      reader.need(saved, stage3 ? "optimizer_state_dict" : "base_optimizer_state");
  const size_t groups = fields.list(masters, "masters").size();
  if (groups != state->groups.size()) {
    fields.fail("The optimizer has another number of groups.", "masters",
                std::to_string(state->groups.size()), std::to_string(groups));
  }
  clear_states(state);
  for (size_t g = 0; g < state->groups.size(); ++g) {
    TrainedGroup& group = state->groups[g];
    int64_t total = 0;
    for (const int number : group.parameters) {
      total += numel(state->parameters[static_cast<size_t>(number)].shape);
    }
    int64_t length = group.buffer_size;
    if (!stage3)
      length -= partition_padding(total, group.buffer_size,
                                  group.expert ? place.at.expert_data : place.zero_rank());
    const std::vector<float> master = reader.values(item_of(fields, masters, g, "masters"), length,
                                                    "master of group " + std::to_string(g));
    std::fill(group.master.begin(), group.master.end(), 0.0f);
    std::copy(master.begin(), master.end(), group.master.begin());
    if (with_states && !mutant("load_without_moments")) {
      load_states(reader, reader.need(optimizer, "state"), static_cast<int64_t>(g),
                  group.buffer_size, 0, &group);
    }
  }
  if (!with_states) return;
  load_settings(fields, reader.need(optimizer, "param_groups"), state);
  state->counters.optimizer_steps = optimizer_steps(reader, reader.need(optimizer, "state"));
  load_scale(fields, reader.need(saved, "loss_scaler"), &state->loss_scale);
}

// A parameter in its own dtype, of stages 0 to 2: from the module, or from the files of the rank's
// experts or layers.
class Weights {
 public:
  Weights(Storage& storage, const std::string& folder, RankReader& model, const RankPlace& place,
          const TrainingState& state, const LoadOptions& options)
      : storage_(storage),
        folder_(folder),
        model_(model),
        place_(place),
        state_(state),
        layered_(state.pipeline_module),
        options_(options),
        layers_(expert_layers(state)) {}

  // Into `target`, which has the parameter's shape.
  void fill(const TrainedParameter& p, std::vector<float>* target) {
    if (options_.custom_load_fn) {
      const size_t count = target->size();
      options_.custom_load_fn([&](const std::string& name) { return module_values(name); }, p,
                              target);
      if (target->size() == count) return;
      throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                            .what = "custom_load_fn has changed the size of a parameter.",
                            .entry = quote(p.name),
                            .expected = std::to_string(count) + " elements",
                            .found = std::to_string(target->size())});
    }
    if (!options_.load_module_strict && !p.expert && !holds(p)) return;
    *target = values(p);
  }

  std::vector<float> values(const TrainedParameter& p) {
    if (layered_) {
      const auto [file_name, local] = place_in_layers(p);
      RankReader& file = opened(file_name);
      return file.values(file.need(file.fields().root(), local), numel(p.shape), p.module_name);
    }
    if (!p.expert) {
      const NodeId module = model_.need(model_.fields().root(), "module");
      return model_.values(model_.need(module, p.name), numel(p.shape), p.name);
    }
    const auto layer = std::ranges::find_if(layers_, [&](const ExpertLayerPlace& place) {
      return p.name.starts_with(place.path + ".experts.");
    });
    const int64_t count = numel(p.shape) / std::max<int64_t>(layer->held, 1);
    std::vector<float> values;
    for (int64_t expert = layer->begin; expert < layer->begin + layer->held; ++expert) {
      const std::string name = p.name + "." + std::to_string(expert);
      RankReader& file = opened(expert_file_name(layer->layer, expert, place_.at.tensor));
      check_folding(file, state_, place_, FoldedFile::kExpert);
      const std::vector<float> one =
          file.values(file.need(file.fields().root(), name), count, name);
      values.insert(values.end(), one.begin(), one.end());
    }
    return values;
  }

  // Whether the module names it.
  bool holds(const TrainedParameter& p) {
    if (!layered_) return has(p.name);
    const auto [file_name, local] = place_in_layers(p);
    RankReader& file = opened(file_name);
    return file.fields().maybe(file.fields().root(), local) != checkpoint::kNoNode;
  }

 private:
  bool has(const std::string& name) const {
    const NodeId module = model_.need(model_.fields().root(), "module");
    return model_.fields().maybe(module, name) != checkpoint::kNoNode;
  }

  RankReader& opened(const std::string& name) {
    return files_.try_emplace(name, storage_, folder_ + "/" + name).first->second;
  }

  std::optional<std::vector<float>> module_values(const std::string& name) {
    if (!has(name)) return std::nullopt;
    const NodeId node = model_.need(model_.need(model_.fields().root(), "module"), name);
    const Shape shape = model_.fields().tensor(node, name).shape;
    return model_.values(node, numel(shape), name);
  }

  Storage& storage_;
  std::string folder_;
  RankReader& model_;
  const RankPlace& place_;
  const TrainingState& state_;
  bool layered_;
  const LoadOptions& options_;
  std::vector<ExpertLayerPlace> layers_;
  std::map<std::string, RankReader> files_;  // of experts (three stacks each), or of layers
};

// `reader`: the file that holds the optimizer.
void load_stage0(RankReader& reader, Weights* weights, TrainingState* state) {
  const Fields& fields = reader.fields();
  NodeId optimizer = reader.need(fields.root(), "optimizer");
  NodeId masters = checkpoint::kNoNode;
  if (const NodeId inner = fields.maybe(optimizer, "optimizer_state_dict");
      inner != checkpoint::kNoNode) {
    masters = reader.need(optimizer, "fp32_groups");
    optimizer = inner;
  }
  const NodeId states = reader.need(optimizer, "state");
  clear_states(state);
  int64_t number = 0;
  for (size_t g = 0; g < state->groups.size(); ++g) {
    TrainedGroup& group = state->groups[g];
    for (size_t k = 0; k < group.pieces.size(); ++k) {
      const BufferPiece& piece = group.pieces[k];
      const TrainedParameter& p = state->parameters[static_cast<size_t>(piece.parameter)];
      const auto master = [&] {
        const NodeId node =
            item_of(fields, item_of(fields, masters, g, "fp32_groups"), k, "fp32_groups");
        return reader.values(node, piece.count, p.name);
      };
      const std::vector<float> values =
          masters == checkpoint::kNoNode ? weights->values(p) : master();
      std::copy(values.begin(), values.end(), group.master.begin() + piece.at);
      load_states(reader, states, number++, piece.count, piece.at, &group);
    }
  }
  load_settings(fields, reader.need(optimizer, "param_groups"), state);
  state->counters.optimizer_steps = optimizer_steps(reader, states);
}

// The weights alone, of stages 0 to 2: masters are the module's tensors, and the optimizer is as it
// was made.
void load_module(Weights* weights, TrainingState* state) {
  for (TrainedGroup& group : state->groups) {
    for (const BufferPiece& piece : group.pieces) {
      const TrainedParameter& p = state->parameters[static_cast<size_t>(piece.parameter)];
      std::vector<float> values(static_cast<size_t>(numel(p.shape)));
      std::copy_n(group.master.begin() + piece.at, piece.count, values.begin() + piece.begin);
      weights->fill(p, &values);
      std::copy_n(values.begin() + piece.begin, piece.count, group.master.begin() + piece.at);
    }
  }
  clear_states(state);
  state->counters.optimizer_steps = 0;
}

// Frozen parameters have no master. Where the module does not hold them (they were excluded from
// the save) a strict load fails, another leaves them as they are. What the module says of them the
// fragments of stages 2 and 3 say again, and these are last (engine.py, load_module_state_dict).
class FrozenLoad {
 public:
  FrozenLoad(RankReader& model, Weights* weights, const RankPlace& place,
             const LoadOptions& options, const TrainingState& state)
      : model_(model),
        weights_(weights),
        place_(place),
        options_(options),
        stage_(state.stage),
        fragments_(model.fields().maybe(model.fields().root(), "frozen_param_fragments")) {}

  std::vector<float> values(const TrainedParameter& p) {
    std::vector<float> values = p.values;
    if (!options_.custom_load_fn && !weights_->holds(p)) {
      if (options_.load_module_strict) refuse(p, "nothing: it was excluded from the save");
    } else if (stage_ < 3) {
      if (!options_.custom_load_fn) check_shape(p);
      weights_->fill(p, &values);
    }
    if (fragments_ == checkpoint::kNoNode) return values;
    const Fields& fields = model_.fields();
    const NodeId fragment = model_.need(fragments_, p.module_name);
    const Shape shape = fields.tensor(fragment, p.module_name).shape;
    const Shape expected =
        stage_ < 3 ? p.shape : Shape{div_ceil(numel(p.shape), place_.topology.zero_ranks())};
    if (shape != expected) refuse(p, to_string(shape), to_string(expected));
    std::vector<float> found = model_.values(fragment, numel(expected), p.module_name);
    found.resize(values.size());  // behind them is padding
    return found;
  }

 private:
  // That of a layer's file is compared by check_layers().
  void check_shape(const TrainedParameter& p) const {
    const NodeId module = model_.fields().maybe(model_.fields().root(), "module");
    if (module == checkpoint::kNoNode) return;
    const Shape found = model_.fields().tensor(model_.need(module, p.name), p.name).shape;
    if (found != p.shape) refuse(p, to_string(found), to_string(p.shape));
  }

  [[noreturn]] void refuse(const TrainedParameter& p, const std::string& found,
                           const std::string& expected = "a tensor") const {
    throw Error(ErrorInfo{.code = ErrorCode::kMismatch,
                          .what = "The checkpoint does not hold this run's frozen parameter "
                                  "(DeepSpeed: RuntimeError).",
                          .file = model_.fields().document().path(),
                          .entry = quote(p.module_name),
                          .expected = expected,
                          .found = found,
                          .next = "name the checkpoint of this model, or load it with "
                                  "load_module_strict=False, which leaves them as they are"});
  }

  RankReader& model_;
  Weights* weights_;
  const RankPlace& place_;
  const LoadOptions& options_;
  int stage_;
  NodeId fragments_;
};

// Masters rounded to the parameters' dtype, which is what a load of weights leaves.
void round_masters(TrainingState* state) {
  for (TrainedGroup& group : state->groups) {
    for (float& value : group.master) value = rounded_to(state->dtype, value);
  }
  state->counters.optimizer_steps = 0;
}

// Stages 1 to 3: names and shapes of the optimizer's parameters, in its order. Stage 0: the
// module's.
void check_model(RankReader& reader, const TrainingState& state) {
  const Fields& fields = reader.fields();
  const auto refuse = [&](const std::string& entry, const std::string& expected,
                          const std::string& found) {
    throw Error(ErrorInfo{.code = ErrorCode::kMismatch,
                          .what = "The checkpoint is of another model (DeepSpeed: RuntimeError, "
                                  "\"Error(s) in loading state_dict\").",
                          .file = fields.document().path(),
                          .entry = quote(entry),
                          .expected = expected,
                          .found = found,
                          .next = state.pipeline_module
                                      ? "name the checkpoint of this model; where it is that, its "
                                        "layers are cut otherwise: isoshard reshard --to pp=N "
                                        "--pp-parts …"
                                      : "name the checkpoint of this model"});
  };
  if (state.stage == 0 && state.pipeline_module) return;  // check_layers() does
  if (state.stage == 0) {
    const NodeId module = reader.need(fields.root(), "module");
    for (const TrainedParameter& p : state.parameters) {
      if (p.expert) continue;    // their files say
      if (p.frozen()) continue;  // FrozenLoad does
      const Shape found = fields.tensor(reader.need(module, p.name), p.name).shape;
      if (found != p.shape) refuse(p.name, to_string(p.shape), to_string(found));
    }
    return;
  }
  const NodeId shapes = reader.need(fields.root(), "param_shapes");
  for (size_t g = 0; g < state.groups.size(); ++g) {
    const auto found = fields.named(item_of(fields, shapes, g, "param_shapes"), "param_shapes");
    size_t at = 0;
    for (const int number : state.groups[g].parameters) {
      const TrainedParameter& p = state.parameters[static_cast<size_t>(number)];
      if (numel(p.shape) == 0) continue;
      if (at == found.size()) refuse(p.module_name, to_string(p.shape), "nothing");
      const auto& [name, node] = found[at++];
      if (name != p.module_name)
        refuse(p.module_name, "in this place of group " + std::to_string(g), quote(name));
      const Shape shape = fields.shape(node, name);
      if (shape != p.shape && !mutant("load_shape_unchecked"))
        refuse(p.module_name, to_string(p.shape), to_string(shape));
    }
    if (at < found.size()) refuse(found[at].first, "no further parameter", "one");
  }
}

}  // namespace

LoadResult load_rank(Storage& storage, const std::string& folder, const RankPlace& place,
                     const LoadOptions& options, TrainingState* state) {
  const std::string name =
      state->stage == 3 ? checkpoint::model_file_name_of_rank(place.zero_rank(), place.mp_rank())
                        : checkpoint::model_file_name(place.mp_rank());
  LoadResult result{.path = folder + "/" + name};
  RankReader model(storage, *result.path);
  const Fields& fields = model.fields();
  const int64_t ranks = model.integer(fields.root(), "dp_world_size");
  const int64_t mp_ranks = model.integer(fields.root(), "mp_world_size");
  const int64_t own = mutant("load_ranks_unchecked") ? ranks : place.topology.zero_ranks();
  const bool with_states = options.load_optimizer_states && !options.load_module_only;
  const bool partitioned = state->stage == 3 || (state->stage > 0 && with_states);
  if ((partitioned && ranks != own) || mp_ranks != place.mp_ranks()) {
    throw Error(ErrorInfo{
        .code = ErrorCode::kMismatch,
        .what = "The checkpoint was saved by another number of ranks (DeepSpeed: "
                "ZeRORuntimeException).",
        .file = *result.path,
        .expected = std::to_string(own) + " data- and sequence-parallel ranks, model-parallel " +
                    std::to_string(place.mp_ranks()),
        .found = std::to_string(ranks) + ", model-parallel " + std::to_string(mp_ranks),
        .next = place.topology.pipeline > 1 ? "isoshard reshard --to dp=…,pp=…"
                                            : "isoshard reshard --to dp=…,sp=…,tp=…"});
  }
  if (state->pipeline_module) {
    if (options.custom_load_fn) {
      throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                            .what = "A pipeline takes no custom_load_fn (DeepSpeed: "
                                    "AssertionError, \"custom_load_fn not supported w. pipeline "
                                    "parallelism\").",
                            .file = *result.path,
                            .next = "leave custom_load_fn out"});
    }
    check_layers(storage, folder, *state, options.load_module_strict);
  }
  const bool module_alone = state->stage < 3 && !with_states, experts = has_experts(*state);
  if (!(module_alone && (options.custom_load_fn || !options.load_module_strict))) {
    check_model(model, *state);
  }
  if (experts) check_folding(model, *state, place, FoldedFile::kModel);
  if (!options.load_module_only) load_counters(model, options, state);
  Weights weights(storage, folder, model, place, *state, options);
  if (state->stage == 0 && with_states && experts) {
    RankReader optimizer(storage,
                         folder + "/" + checkpoint::expert_optim_file_name(place.at.expert));
    load_stage0(optimizer, &weights, state);
  } else if (state->stage == 0 && with_states) {
    load_stage0(model, &weights, state);
  } else if (module_alone) {
    load_module(&weights, state);
  } else {
    const std::string prefix = state->dtype == DType::kBFloat16 ? "bf16_" : "";
    RankReader optimizer(
        storage,
        folder + "/" + checkpoint::optim_file_name(prefix, place.zero_rank(), place.mp_rank()));
    check_folding(optimizer, *state, place, FoldedFile::kOptimizer);
    load_partitions(optimizer, place, with_states, state);
    if (!with_states && !mutant("load_weights_unrounded")) round_masters(state);
  }
  FrozenLoad frozen(model, &weights, place, options, *state);
  for (TrainedParameter& p : state->parameters) {
    if (p.frozen()) p.values = frozen.values(p);
  }
  if (state->counters.optimizer_steps < 0) {  // the optimizer counts none
    state->counters.optimizer_steps = state->counters.steps - state->counters.skipped_steps;
  }
  result.client_state = client_state(fields, options);
  return result;
}

}  // namespace isoshard::engine
