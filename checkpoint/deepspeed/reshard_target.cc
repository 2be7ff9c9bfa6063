// See reshard_target.h.
#include "checkpoint/deepspeed/reshard_target.h"

#include <algorithm>
#include <cstdio>
#include <optional>

#include "checkpoint/cancel.h"
#include "checkpoint/deepspeed/config_text.h"
#include "checkpoint/deepspeed/expert_groups.h"
#include "checkpoint/deepspeed/hyper.h"
#include "checkpoint/deepspeed/model_states.h"
#include "core/check.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

void refuse_topology(const ShardedState& state, const Topology& topology, int stage) {
  const auto no = [&](const std::string& what, const std::string& next) {
    throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                          .what = what,
                          .file = state.folder,
                          .expected = "a topology that DeepSpeed has files for",
                          .found = to_string(topology),
                          .next = next});
  };
  if (topology.tensor > 1 && topology.sequence > 1)
    no("DeepSpeed has no files for tensor- and sequence-parallel ranks together.",
       "say tp=1 or sp=1 too");
  if (topology.expert > 1 && state.expert_layout == ExpertLayout::kNone)
    no("The checkpoint has no experts that expert-parallel ranks could share.", "leave ep out");
  const bool folded = state.expert_layout != ExpertLayout::kNone && topology.tensor > 1;
  const bool own = topology == state.topology && state.flavour == Flavour::kZero12;
  if (folded && (!own || stage < 1 || stage > 2))
    no("Experts with tensor-parallel ranks (AutoEP folded with AutoTP) are written at their own "
       "topology alone, at stages 1 and 2.",
       "say tp=1 too");
  if (state.flavour == Flavour::kWeights)
    no("Weights alone have no optimizer state to reshard.", "take the checkpoint they are from");
}

// A PipelineModule stays one at one stage too: its parameters are named by layer.
void refuse_pipeline(const ShardedState& state, const Topology& topology, int stage) {
  const auto no = [&](const std::string& what, const std::string& found, const std::string& next) {
    throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                          .what = what,
                          .file = state.folder,
                          .found = found,
                          .next = next});
  };
  const Fields model(state.document(state.model_files[0]));
  const bool no_module = model.maybe(model.root(), "module") == kNoNode;
  if (!state.pipeline.present() && no_module)
    no("A universal folder of a pipeline does not hold what its layer files do.",
       "a universal folder",
       "reshard the ZeRO checkpoint it is from; DeepSpeed itself loads the folder at any pp");
  if (!state.pipeline.present() && topology.pipeline > 1)
    no("The checkpoint is not of a PipelineModule, whose layers pipeline stages could share.",
       "pp=" + std::to_string(topology.pipeline), "leave pp out");
  if (!state.pipeline.present()) return;
  if (topology.sequence > 1)
    no("A pipeline has no sequence-parallel ranks.", to_string(topology), "say sp=1");
  if (topology.tensor > 1 && state.split_file < 0)
    no("The pipeline does not say how its tensors are cut over tensor-parallel ranks: no "
       "universal_checkpoint_info of the caller's stands in its model files.",
       "tp=" + std::to_string(topology.tensor), "say tp=1");
  if (stage >= 2)
    no("DeepSpeed has no pipelines at stages 2 and 3 (AssertionError), whatever their number of "
       "stages.",
       "stage=" + std::to_string(stage), "say stage=1");
  const NodeId config = model.maybe(model.root(), "ds_config");
  if (stage == 0 && !is_bf16(model, config))
    no("Resharding of a pipeline to stage 0 is supported in bf16 alone.", "stage=0", "say stage=1");
}

// A group as one tensor- or expert-parallel rank has it: the parameters in flat order.
struct Members {
  int group;
  int shard;
  int ranks;  // of its partition group
  bool experts;
  std::vector<int> order;
};

std::vector<TargetBuffer>& list_for(ReshardTarget* target, const Members& members) {
  auto& lists = members.experts ? target->expert_buffers : target->buffers;
  return lists[static_cast<size_t>(members.shard)];
}

TargetBuffer empty_buffer(const Members& members) {
  return {.group = members.group,
          .experts = members.experts,
          .shard = members.shard,
          .ranks = members.ranks,
          .parameters = {},
          .layouts = {},
          .alignment = {}};
}

void add_flat_buffer(ReshardTarget* target, const Members& members) {
  const std::vector<int>& order = members.order;
  TargetBuffer buffer = empty_buffer(members);
  buffer.parameters = order;
  for (size_t i = 0; i < order.size(); ++i) {
    const ParameterState& parameter = target->parameter(order[i]);
    const int64_t count = numel(target->shard_shape(order[i], members.shard));
    buffer.layouts.push_back(
        {.numel = count, .ranks = members.ranks, .placement = FlatShard{buffer.total, 1}});
    buffer.total += count;
    const bool pads = target->aligned && i + 1 < order.size();
    buffer.alignment.push_back(
        pads ? alignment_padding(buffer.total, item_size_bytes(parameter.model_dtype)) : 0);
    buffer.total += buffer.alignment.back();
  }
  buffer.partition = flat_sizes(buffer.total, members.ranks).partition;
  for (TensorLayout& layout : buffer.layouts)
    std::get<FlatShard>(layout.placement).partition = std::max<int64_t>(buffer.partition, 1);
  list_for(target, members).push_back(std::move(buffer));
}

void add_slot_buffers(ReshardTarget* target, const Members& members, int64_t sub_group_size) {
  const std::vector<int>& order = members.order;
  std::vector<int64_t> numels;
  for (int number : order) numels.push_back(numel(target->shard_shape(number, members.shard)));
  size_t next = 0;
  for (int count : sub_group_counts(numels, members.ranks, sub_group_size)) {
    TargetBuffer buffer = empty_buffer(members);
    for (int i = 0; i < count; ++i, ++next) {
      const int64_t slot = slot_size(numels[next], members.ranks);
      buffer.parameters.push_back(order[next]);
      buffer.layouts.push_back(
          {.numel = numels[next],
           .ranks = members.ranks,
           .placement = SlotShard{buffer.partition, std::max<int64_t>(slot, 1)}});
      buffer.partition += slot;
    }
    buffer.total = buffer.partition;
    list_for(target, members).push_back(std::move(buffer));
  }
}

// Per-rank client state can only be carried rank by rank.
void check_client_state(const ShardedState& state, const ReshardTarget& target,
                        const std::set<std::string>& allow_dropped) {
  if (state.own_client_state.empty() || has_same_model_files(target) ||
      allow_dropped.count("client_state"))
    return;
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

// The parameters of a group that an mp rank holds, in the optimizer's order.
std::vector<int> held_by(const ReshardTarget& target, int group, int shard) {
  if (target.stages.held.empty()) return target.state.groups[static_cast<size_t>(group)].parameters;
  std::vector<int> result;
  for (int number : target.stages.held[static_cast<size_t>(target.stage_of(shard))]) {
    if (target.parameter(number).group == group) result.push_back(number);
  }
  return result;
}

// The parameters of a group that have elements on an mp rank, in flat order. Before 0.19.8 those
// without stood there too.
Members members_of(const ReshardTarget& target, int group, int shard, bool round_robin) {
  const bool experts = target.expert_groups[static_cast<size_t>(group)];
  const int expert_ranks = target.topology.expert;
  Members members{
      group, shard, experts ? target.expert_world() / expert_ranks : target.ranks, experts, {}};
  for (int number : held_by(target, group, shard)) {
    if (experts && !target.holds_expert(shard, number)) continue;
    const bool empty =
        numel(target.shard_shape(number, shard)) == 0 && numel(target.parameter(number).shape) != 0;
    if (!empty || !target.writes_alignment) members.order.push_back(number);
  }
  const std::vector<int>& all = target.state.groups[static_cast<size_t>(group)].parameters;
  if (members.order.empty() && !all.empty()) {
    const bool stages = !target.stages.held.empty();
    throw Error(ErrorInfo{
        .code = ErrorCode::kUnsupported,
        .what = std::string(stages ? "A pipeline stage" : "A tensor-parallel rank") +
                " would hold no element of an optimizer group, which DeepSpeed cannot train.",
        .file = target.state.folder,
        .entry = "group " + std::to_string(group) + ", " + quote(target.parameter(all[0]).name),
        .expected = "an element on every rank",
        .found = "none on rank " + std::to_string(shard),
        .next = stages ? "take a smaller pp, or other stages (--pp-parts)" : "take a smaller tp"});
  }
  if (!round_robin) return members;
  std::vector<int> permuted;
  for (int index : round_robin_order(static_cast<int>(members.order.size()), members.ranks))
    permuted.push_back(members.order[static_cast<size_t>(index)]);
  members.order = std::move(permuted);
  return members;
}

// Which optimizer's form it has, and what that form records.
void choose_form(ReshardTarget* whole, const Fields& model, NodeId config) {
  ReshardTarget& target = *whole;
  const ShardedState& state = target.state;
  const int stage = target.stage;
  const bool bf16 = is_bf16(model, config);
  target.prefix = bf16 ? "bf16_" : "";
  const std::string gradients = config_text(model, config, "data_types", "grad_accum_dtype");
  const bool by_config = bf16 && means_fp32(gradients) && !offloads_to_cpu(model, config);
  const bool of_stage1 = state.flavour == Flavour::kBf16Optimizer && state.stage == 1;
  target.bf16_optimizer =
      (stage == 1 && (of_stage1 || by_config)) || (stage == 0 && bf16 && state.pipeline.present());
  if (stage == 0 && target.bf16_optimizer)
    target.beyond.insert(
        "a bf16 pipeline at stage 0: DeepSpeed saves this form, and from 0.18.9 to 0.19.8 cannot "
        "load it (KeyError: 0); it loads stage=1");
  target.aligned = stage >= 1 && stage <= 2 && !target.bf16_optimizer &&
                   zero_option(model, config, "parameter_alignment", 0) != 0;
  int major = 0, minor = 0, patch = 0;
  std::sscanf(state.version.c_str(), "%d.%d.%d", &major, &minor, &patch);
  target.writes_alignment = major * 1'000'000 + minor * 1'000 + patch >= 19'008;
  target.frozen_excluded =
      state.stage >= 2 && model.maybe(model.root(), "frozen_param_shapes") == kNoNode &&
      std::ranges::all_of(state.parameters, [](const ParameterState& p) { return p.group >= 0; });
}

// A rank with more experts than another may fill a sub-group earlier; all must name the same.
void check_sub_groups(const ReshardTarget& target) {
  for (const std::vector<TargetBuffer>& buffers : target.expert_buffers) {
    const bool same = std::ranges::equal(
        buffers, target.expert_buffers[0], [](const TargetBuffer& a, const TargetBuffer& b) {
          return a.group == b.group && a.parameters == b.parameters;
        });
    if (same) continue;
    throw Error(
        ErrorInfo{.code = ErrorCode::kUnsupported,
                  .what = "Ranks with unequal shares of experts would fill sub-groups differently.",
                  .file = target.state.folder,
                  .entry = "zero_optimization.sub_group_size",
                  .expected = "the same parameters in every rank's sub-groups",
                  .found = "others",
                  .next = "take an ep that divides the experts, or stage=1 or 2"});
  }
}

void note_padding(ReshardTarget* whole) {
  ReshardTarget& target = *whole;
  const ShardedState& state = target.state;
  for (size_t i = 0; i < state.parameters.size(); ++i) {
    const ParameterState& parameter = state.parameters[i];
    const bool padded = parameter.weight >= 0 && state.leaf(parameter.weight).padding >= 0;
    if (padded && (target.maps.empty() || target.maps[i] != state.split_of(parameter).map))
      target.skipped.insert("padding rows of " + quote(parameter.name) +
                            ": they begin anew at another tp, as zeros");
  }
}

}  // namespace

ReshardTarget make_target(const ShardedState& state, const Topology& topology, int stage,
                          const ReshardOptions& options) {
  refuse_topology(state, topology, stage);
  refuse_pipeline(state, topology, stage);
  const int mp_ranks = topology.tensor * topology.pipeline;
  ReshardTarget target{
      .state = state,
      .topology = topology,
      .stage = stage,
      .ranks = topology.zero_ranks(),
      .prefix = "",
      .buffers = std::vector<std::vector<TargetBuffer>>(static_cast<size_t>(mp_ranks)),
      .expert_buffers = {},
      .expert_partitions = {},
      .expert_groups = std::vector<bool>(state.groups.size(), false),
      .maps = {},
      .experts = nullptr,
      .stages = {},
      .beyond_deepspeed = options.beyond_deepspeed,
      .local_experts = {},
      .creation_numbers = {},
      .inferred = {},
      .synthesised = {},
      .skipped = {},
      .beyond = {}};
  const Fields model(state.document(target.model_file()));
  const NodeId config = model.maybe(model.root(), "ds_config");
  choose_form(&target, model, config);
  // A pipeline's caller pads a vocabulary and names the splits at one tensor-parallel rank too.
  if (topology.tensor > 1 || (state.pipeline.present() && state.split_file >= 0))
    target.maps = target_maps(state, topology.tensor, options.splits, &target.inferred);
  note_padding(&target);
  if (state.pipeline.present())
    target.stages =
        plan_stages(state, topology.pipeline, options.stages, target.maps, &target.inferred);
  const bool round_robin = stage >= 1 && stage <= 2 && !target.bf16_optimizer &&
                           zero_option(model, config, "round_robin_gradients", 0) != 0;
  const int64_t sub_group_size = zero_option(model, config, "sub_group_size", 1'000'000'000);
  if (state.expert_layout != ExpertLayout::kNone) prepare_experts(&target, options.experts_grouped);
  if (stage == 3) number_parameters(&target);
  for (size_t g = 0; g < state.groups.size(); ++g) {
    const int shards = target.expert_groups[g] ? topology.expert : mp_ranks;
    for (int shard = 0; shard < shards; ++shard) {
      const Members members = members_of(target, static_cast<int>(g), shard, round_robin);
      if (stage == 3)
        add_slot_buffers(&target, members, sub_group_size);
      else
        add_flat_buffer(&target, members);
    }
  }
  if (stage == 3) check_sub_groups(target);
  return target;
}

bool has_same_model_files(const ReshardTarget& target) {
  const int per_shard = target.stage == 3 ? target.ranks : 1;
  const bool stage3 =
      target.state.flavour == Flavour::kZero3 || target.state.flavour == Flavour::kUniversal3;
  return stage3 == (target.stage == 3) && target.state.topology.tensor == target.topology.tensor &&
         target.state.topology.pipeline == target.topology.pipeline &&
         static_cast<int>(target.state.model_files.size()) ==
             per_shard * target.topology.tensor * target.topology.pipeline;
}

int ReshardTarget::model_leaf(const ParameterState& parameter) {
  if (parameter.model_copy >= 0) return parameter.model_copy;
  if (state.leaf(parameter.weight).dtype != parameter.model_dtype)
    synthesised.insert("module: weights in the model's dtype, cast from the masters");
  return parameter.weight;
}

const RankMap* ReshardTarget::map_of(int number, int shard) const {
  if (maps.empty() || maps[static_cast<size_t>(number)].ranks.empty()) return nullptr;
  const int rank = is_expert(number) ? shard : shard % topology.tensor;
  return &maps[static_cast<size_t>(number)].ranks[static_cast<size_t>(rank)];
}

Shape ReshardTarget::shard_shape(int number, int shard) const {
  const RankMap* map = map_of(number, shard);
  if (map == nullptr) return parameter(number).shape;
  return joined_axes(map->shard_shape, parameter(number).shape.size());
}

void ReshardTarget::add_runs(StorageFill* fill, int number, int shard,
                             const LeafRun& shard_run) const {
  if (shard_run.count == 0) return;
  const RankMap* map = map_of(number, shard);
  if (map == nullptr) {
    fill->runs.push_back(shard_run);
    return;
  }
  const Leaf& leaf = state.leaf(shard_run.leaf);
  const int64_t total = leaf.size_elements();
  const int64_t begin = shard_run.begin, end = begin + shard_run.count;
  // Where the ranks hold what they held, they keep the padding rows too.
  const bool keeps = leaf.padding >= 0 &&
                     maps[static_cast<size_t>(number)] == state.split_of(parameter(number)).map;
  for (const MapPiece& piece : map->pieces) {
    for (const MapRun& run : piece_runs(piece)) {
      const int64_t from = std::max(begin, run.dest);
      const int64_t source = run.source + (from - run.dest);
      const int64_t to = std::min({end, run.dest + run.count, from + total - source});
      if (from < to)
        fill->runs.push_back({shard_run.leaf, source, to - from, shard_run.at + from - begin});
      const int64_t rest = std::max({from, begin, run.dest + total - run.source});
      const int64_t last = std::min(end, run.dest + run.count);
      if (keeps && rest < last)
        fill->runs.push_back({leaf.padding, run.source + rest - run.dest - total, last - rest,
                              shard_run.at + rest - begin});
    }
  }
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
  const NodeId tensor = model.maybe(config, "tensor_parallel");
  if (tensor != kNoNode && model.pickle().is_mapping(tensor)) {
    MappingCopy section(builder, target.state, {file, tensor});
    section.set("autotp_size", builder->pickle.integer(target.topology.tensor));
    copy.set("tensor_parallel", section.finish());
  } else if (target.topology.tensor > 1 && target.stages.held.empty()) {
    copy.set("tensor_parallel",
             builder->dict({{"autotp_size", builder->pickle.integer(target.topology.tensor)}}));
  }
  if (const NodeId expert = model.maybe(config, "expert_parallel");
      expert != kNoNode && model.pickle().is_mapping(expert)) {
    MappingCopy section(builder, target.state, {file, expert});
    section.set("autoep_size", builder->pickle.integer(target.topology.expert));
    copy.set("expert_parallel", section.finish());
  }
  copy.set_if_present("sequence_parallel_size", builder->pickle.integer(target.topology.sequence));
  return copy.finish();
}

StorageFill rank_fill(const ReshardTarget& target, const TargetBuffer& buffer, int rank,
                      const std::vector<int>& leaves, DType dtype) {
  StorageFill fill{
      .dtype = dtype, .numel = buffer.partition, .runs = {}, .copy = {}, .literal = {}};
  CHECK(leaves.size() == buffer.parameters.size(), "one leaf a parameter");
  for (size_t i = 0; i < leaves.size(); ++i) {
    if (buffer.layouts[i].numel == 0) continue;
    if (const RankFragment f = fragment_on(buffer.layouts[i], rank); f.count > 0) {
      target.add_runs(&fill, buffer.parameters[i], buffer.shard,
                      {leaves[i], f.begin, f.count, f.offset_local});
    }
  }
  return fill;
}

TargetFiles reshard_blueprints(const ShardedState& source, const Topology& topology, int stage,
                               const ReshardOptions& wanted) {
  std::vector<std::string> inferred;
  Regrouped regrouped;
  if (!wanted.experts_grouped)
    regrouped = regroup_experts(source, topology.expert, wanted.moe_max_group_size, &inferred);
  const ShardedState& state = regrouped.state ? *regrouped.state : source;
  ReshardOptions options = wanted;
  options.experts_grouped = regrouped.known;
  ReshardTarget target = make_target(state, topology, stage, options);
  target.inferred.insert(target.inferred.end(), inferred.begin(), inferred.end());
  check_client_state(state, target, options.allow_dropped);
  check_loss_scaler(state, stage, options.allow_dropped);
  TargetFiles result;
  for (int mp = 0; mp < topology.tensor * topology.pipeline; ++mp) {
    for (int rank = 0; rank < (stage == 3 ? target.ranks : 1); ++rank) {
      throw_if_cancelled();
      result.files.push_back(model_blueprint(&target, {mp, rank}));
    }
    for (int rank = 0; rank < (target.partitioned() ? target.ranks : 0); ++rank) {
      throw_if_cancelled();
      result.files.push_back(optim_blueprint(&target, {mp, rank}));
    }
  }
  for (int rank = 0; target.experts && stage == 0 && rank < topology.expert; ++rank)
    result.files.push_back(stage0_blueprint(&target, rank));
  if (state.expert_layout != ExpertLayout::kNone && stage != 3) {
    for (FileBlueprint& file : expert_blueprints(&target)) result.files.push_back(std::move(file));
  }
  for (FileBlueprint& file : layer_blueprints(&target)) result.files.push_back(std::move(file));
  result.inferred = target.inferred;
  result.synthesised.assign(target.synthesised.begin(), target.synthesised.end());
  result.skipped.assign(target.skipped.begin(), target.skipped.end());
  result.beyond.assign(target.beyond.begin(), target.beyond.end());
  return result;
}

}  // namespace isoshard::checkpoint
