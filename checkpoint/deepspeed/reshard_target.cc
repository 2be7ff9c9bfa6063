// See reshard_target.h.
#include "checkpoint/deepspeed/reshard_target.h"

#include <algorithm>
#include <cstdio>

#include "checkpoint/cancel.h"
#include "checkpoint/deepspeed/hyper.h"
#include "checkpoint/deepspeed/model_states.h"
#include "core/check.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

// ds_config[section][key] as text of a string or "True"/"False"; empty if absent.
std::string config_text(const Fields& fields, NodeId config, const char* section, const char* key) {
  if (config == kNoNode) return "";
  const NodeId inner = fields.maybe(config, section);
  if (inner == kNoNode || !fields.pickle().is_mapping(inner)) return "";
  const NodeId value = fields.maybe(inner, key);
  if (value == kNoNode) return "";
  if (fields.pickle().kind(value) == Kind::kString) return fields.pickle().text(value);
  if (fields.pickle().kind(value) == Kind::kBool)
    return fields.pickle().integer_value(value) ? "True" : "False";
  return "";
}

void refuse_topology(const ShardedState& state, const Topology& topology) {
  const auto no = [&](const std::string& what) {
    throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                          .what = what,
                          .file = state.folder,
                          .expected = "dp, sp and stage",
                          .found = to_string(topology)});
  };
  if (topology.tensor > 1) no("Resharding to tensor-parallel ranks is not supported yet.");
  if (topology.expert > 1) no("Resharding to expert-parallel ranks is not supported yet.");
  if (topology.pipeline > 1) no("Resharding to pipeline stages is not supported yet.");
  if (state.flavour == Flavour::kWeights) no("Weights alone have no optimizer state to reshard.");
}

void add_flat_buffer(ReshardTarget* target, int group, const std::vector<int>& order) {
  TargetBuffer buffer{.group = group, .parameters = order, .layouts = {}, .alignment = {}};
  for (size_t i = 0; i < order.size(); ++i) {
    const ParameterState& parameter = target->parameter(order[i]);
    const int64_t count = numel(parameter.shape);
    buffer.layouts.push_back(
        {.numel = count, .ranks = target->ranks, .placement = FlatShard{buffer.total, 1}});
    buffer.total += count;
    const bool pads = target->aligned && i + 1 < order.size();
    buffer.alignment.push_back(
        pads ? alignment_padding(buffer.total, item_size_bytes(parameter.model_dtype)) : 0);
    buffer.total += buffer.alignment.back();
  }
  buffer.partition = flat_sizes(buffer.total, target->ranks).partition;
  for (TensorLayout& layout : buffer.layouts)
    std::get<FlatShard>(layout.placement).partition = std::max<int64_t>(buffer.partition, 1);
  target->buffers.push_back(std::move(buffer));
}

void add_slot_buffers(ReshardTarget* target, int group, const std::vector<int>& order,
                      int64_t sub_group_size) {
  std::vector<int64_t> numels;
  for (int number : order) numels.push_back(numel(target->parameter(number).shape));
  size_t next = 0;
  for (int count : sub_group_counts(numels, target->ranks, sub_group_size)) {
    TargetBuffer buffer{.group = group, .parameters = {}, .layouts = {}, .alignment = {}};
    for (int i = 0; i < count; ++i, ++next) {
      const int64_t slot = slot_size(numels[next], target->ranks);
      buffer.parameters.push_back(order[next]);
      buffer.layouts.push_back(
          {.numel = numels[next],
           .ranks = target->ranks,
           .placement = SlotShard{buffer.partition, std::max<int64_t>(slot, 1)}});
      buffer.partition += slot;
    }
    buffer.total = buffer.partition;
    target->buffers.push_back(std::move(buffer));
  }
}

// Per-rank client state can only be carried rank by rank.
void check_client_state(const ShardedState& state, const ReshardTarget& target,
                        const std::set<std::string>& allow_dropped) {
  const bool same_ranks =
      target.stage == 3 && target.ranks == static_cast<int>(state.model_files.size());
  if (state.own_client_state.empty() || same_ranks || allow_dropped.count("client_state")) return;
  throw Error(ErrorInfo{
      .code = ErrorCode::kUnsupported,
      .what = "Ranks saved a client state of their own; another number of ranks cannot hold it.",
      .file = state.files[static_cast<size_t>(state.own_client_state[0])].path,
      .entry = "client_state",
      .expected = "as in rank 0's file",
      .found = "another value, in " + std::to_string(state.own_client_state.size()) + " files",
      .next = "pass --allow-dropped client_state to carry rank 0's and leave the others behind"});
}

// Stage 0 keeps fewer fields of a dynamic loss scaler than the other stages.
void check_loss_scaler(const ShardedState& state, int stage,
                       const std::set<std::string>& allow_dropped) {
  if (stage != 0 || state.flavour == Flavour::kZero0 || allow_dropped.count("loss_scaler")) return;
  const nlohmann::json scaler = hyper_json(state)["loss_scaler"];
  if (!scaler.value("dynamic", false) || !scaler.contains("cur_hysteresis")) return;
  throw Error(
      ErrorInfo{.code = ErrorCode::kUnsupported,
                .what = "A stage-0 file cannot hold the hysteresis of a dynamic loss scaler.",
                .file = state.folder,
                .entry = "loss_scaler",
                .expected = "a static loss scaler",
                .found = scaler.dump(),
                .next = "pass --allow-dropped loss_scaler: the scale itself is kept, the rest "
                        "comes from ds_config again"});
}

}  // namespace

ReshardTarget make_target(const ShardedState& state, const Topology& topology, int stage) {
  refuse_topology(state, topology);
  ReshardTarget target{.state = state,
                       .topology = topology,
                       .stage = stage,
                       .ranks = topology.zero_ranks(),
                       .prefix = "",
                       .buffers = {},
                       .synthesised = {},
                       .skipped = {}};
  const Fields model(state.document(target.model_file()));
  const NodeId config = model.maybe(model.root(), "ds_config");
  const bool bf16 = config_text(model, config, "bf16", "enabled") == "True" ||
                    config_text(model, config, "bfloat16", "enabled") == "True";
  target.prefix = bf16 ? "bf16_" : "";
  const std::string gradients = config_text(model, config, "data_types", "grad_accum_dtype");
  const bool by_config = bf16 && (gradients == "fp32" || gradients == "float32") &&
                         zero_option(model, config, "offload_optimizer", 0) == 0;
  target.bf16_optimizer = stage == 1 && (state.flavour == Flavour::kBf16Optimizer || by_config);
  target.aligned = stage >= 1 && stage <= 2 && !target.bf16_optimizer &&
                   zero_option(model, config, "parameter_alignment", 0) != 0;
  int major = 0, minor = 0, patch = 0;
  std::sscanf(state.version.c_str(), "%d.%d.%d", &major, &minor, &patch);
  target.writes_alignment = major * 1'000'000 + minor * 1'000 + patch >= 19'008;
  target.frozen_excluded =
      state.stage >= 2 && model.maybe(model.root(), "frozen_param_shapes") == kNoNode &&
      std::ranges::all_of(state.parameters, [](const ParameterState& p) { return p.group >= 0; });
  const bool round_robin = stage >= 1 && stage <= 2 && !target.bf16_optimizer &&
                           zero_option(model, config, "round_robin_gradients", 0) != 0;
  const int64_t sub_group_size = zero_option(model, config, "sub_group_size", 1'000'000'000);
  for (size_t g = 0; g < state.groups.size(); ++g) {
    std::vector<int> order = state.groups[g].parameters;
    if (round_robin) {
      std::vector<int> permuted;
      for (int index : round_robin_order(static_cast<int>(order.size()), target.ranks))
        permuted.push_back(order[static_cast<size_t>(index)]);
      order = std::move(permuted);
    }
    if (stage == 3)
      add_slot_buffers(&target, static_cast<int>(g), order, sub_group_size);
    else
      add_flat_buffer(&target, static_cast<int>(g), order);
  }
  return target;
}

MappingCopy::MappingCopy(TorchBuilder* builder, const ShardedState& state, NodeRef mapping)
    : builder_(*builder), document_(state.document(mapping.file)), file_(mapping.file) {
  const Pickle& pickle = document_.pickle();
  const std::vector<NodeId>& list = pickle.entries(mapping.node);
  for (size_t i = 0; i + 1 < list.size(); i += 2) {
    entries_.emplace_back(list[i], kNoNode);
    keys_.push_back(pickle.kind(list[i]) == Kind::kString ? pickle.text(list[i]) : "");
    values_.push_back(list[i + 1]);
  }
}

void MappingCopy::set(const std::string& key, NodeId value) {
  for (size_t i = 0; i < keys_.size(); ++i) {
    if (keys_[i] == key) {
      entries_[i].second = value;
      return;
    }
  }
  appended_.emplace_back(key, value);
}

void MappingCopy::set_if_present(const std::string& key, NodeId value) {
  if (std::find(keys_.begin(), keys_.end(), key) != keys_.end()) set(key, value);
}

NodeId MappingCopy::finish() {
  std::vector<NodeId> items;
  for (size_t i = 0; i < entries_.size(); ++i) {
    items.push_back(builder_.copy(document_, file_, entries_[i].first));
    items.push_back(entries_[i].second != kNoNode ? entries_[i].second
                                                  : builder_.copy(document_, file_, values_[i]));
  }
  for (const auto& [key, value] : appended_) {
    items.push_back(builder_.pickle.string(key));
    items.push_back(value);
  }
  return builder_.pickle.dict(std::move(items));
}

NodeId target_config(TorchBuilder* builder, const ReshardTarget& target) {
  const int file = target.model_file();
  const Fields model(target.state.document(file));
  const NodeId config = model.maybe(model.root(), "ds_config");
  if (config == kNoNode || !model.pickle().is_mapping(config)) return builder->pickle.none();
  MappingCopy copy(builder, target.state, {file, config});
  const NodeId zero = model.maybe(config, "zero_optimization");
  if (zero != kNoNode && model.pickle().is_mapping(zero)) {
    MappingCopy section(builder, target.state, {file, zero});
    section.set("stage", builder->pickle.integer(target.stage));
    copy.set("zero_optimization", section.finish());
  } else if (target.stage != 0) {
    copy.set("zero_optimization",
             builder->dict({{"stage", builder->pickle.integer(target.stage)}}));
  }
  copy.set_if_present("sequence_parallel_size", builder->pickle.integer(target.topology.sequence));
  return copy.finish();
}

StorageFill rank_fill(const TargetBuffer& buffer, int rank, const std::vector<int>& leaves,
                      DType dtype) {
  StorageFill fill{
      .dtype = dtype, .numel = buffer.partition, .runs = {}, .copy = {}, .literal = {}};
  CHECK(leaves.size() == buffer.parameters.size(), "one leaf a parameter");
  for (size_t i = 0; i < leaves.size(); ++i) {
    if (buffer.layouts[i].numel == 0) continue;
    if (const RankFragment f = fragment_on(buffer.layouts[i], rank); f.count > 0) {
      fill.runs.push_back({leaves[i], f.begin, f.count, f.offset_local});
    }
  }
  return fill;
}

TargetFiles reshard_blueprints(const ShardedState& state, const Topology& topology, int stage,
                               const std::set<std::string>& allow_dropped) {
  ReshardTarget target = make_target(state, topology, stage);
  check_client_state(state, target, allow_dropped);
  check_loss_scaler(state, stage, allow_dropped);
  TargetFiles result;
  for (int rank = 0; rank < (stage == 3 ? target.ranks : 1); ++rank) {
    throw_if_cancelled();
    result.files.push_back(model_blueprint(&target, rank));
  }
  for (int rank = 0; rank < (stage == 0 ? 0 : target.ranks); ++rank) {
    throw_if_cancelled();
    result.files.push_back(optim_blueprint(&target, rank));
  }
  result.synthesised.assign(target.synthesised.begin(), target.synthesised.end());
  result.skipped.assign(target.skipped.begin(), target.skipped.end());
  return result;
}

}  // namespace isoshard::checkpoint
