// See rank_files.h: the optimizer file of a rank.
#include <map>

#include "checkpoint/deepspeed/names.h"
#include "core/mutant.h"
#include "core/zero_rules.h"
#include "engine/expert_files.h"
#include "engine/folding.h"
#include "engine/rank_writer.h"

namespace isoshard::engine {
namespace {

using checkpoint::FileBlueprint;
using checkpoint::NodeId;
using checkpoint::ObjectParts;
using checkpoint::TorchBuilder;

class OptimFile : public RankWriter {
 public:
  using RankWriter::RankWriter;

  FileBlueprint run() {
    Entries root = {{"optimizer_state_dict", state_.stage == 3 ? stage3() : stage12()},
                    {"ds_config", json_node(&builder_, content_.config)},
                    {"ds_version", pickle().string(content_.version)}};
    if (is_folded(state_, place_.topology)) {
      root.emplace_back("folding", folding_node(&builder_, state_, place_, FoldedFile::kOptimizer));
    }
    const std::string prefix = state_.dtype == DType::kBFloat16 ? "bf16_" : "";
    return builder_.finish(
        checkpoint::optim_file_name(
            prefix, mutant("optimizer_of_data_rank") ? place_.at.data : place_.zero_rank(),
            place_.mp_rank()),
        builder_.dict(std::move(root)));
  }

 private:
  NodeId stage12() {
    std::vector<int64_t> paddings, counts;
    std::vector<NodeId> masters, alignments, maps;
    for (const TrainedGroup& group : state_.groups) {
      const int64_t padding = partition_padding(total(group), group.buffer_size, rank_in(group));
      paddings.push_back(padding);
      counts.push_back(ranks_of(group));
      masters.push_back(builder_.tensor(
          {.shape = {group.buffer_size - (mutant("master_with_padding") ? 0 : padding)},
           .storage = value_storage(&builder_, group.master, DType::kFloat32),
           .requires_grad = true}));
      alignments.push_back(integers(std::vector<int64_t>(owned(group).size(), 0)));
      maps.push_back(slice_map(group));
    }
    Entries entries;
    add_scaler(&entries);
    entries.emplace_back("clip_grad", pickle().real(state_.clip));
    entries.emplace_back("base_optimizer_state", base_state());
    entries.emplace_back("single_partition_of_fp32_groups", pickle().list(std::move(masters)));
    entries.emplace_back("zero_stage", stage_enum());
    entries.emplace_back("group_paddings", integers(paddings));
    entries.emplace_back("param_alignment_paddings", pickle().list(std::move(alignments)));
    entries.emplace_back("partition_count", integers(counts));
    entries.emplace_back("ds_version", pickle().string(content_.version));
    entries.emplace_back("param_slice_mappings", pickle().list(std::move(maps)));
    return builder_.dict(std::move(entries));
  }

  NodeId stage3() {
    Entries entries = {{"zero_stage", stage_enum()}};
    add_scaler(&entries);
    entries.emplace_back("partition_count", pickle().integer(ranks()));
    if (has_experts(state_)) {
      entries.emplace_back("ds_zero_partition_groups", partition_groups());
    }
    entries.emplace_back("optimizer_state_dict", base_state());
    std::vector<NodeId> flats;
    for (const TrainedGroup& group : state_.groups) {
      const std::vector<int> list = owned(group);
      flats.push_back(builder_.tensor_with_attribute(
          {.shape = {group.buffer_size},
           .storage = value_storage(&builder_, group.master, DType::kFloat32),
           .requires_grad = true},
          "ds_id", std::to_string(list.front()) + "_" + std::to_string(list.back())));
    }
    entries.emplace_back("fp32_flat_groups", pickle().list(std::move(flats)));
    return builder_.dict(std::move(entries));
  }

  // Stage 3 with experts: who shares each group.
  NodeId partition_groups() {
    std::vector<NodeId> list;
    for (const TrainedGroup& group : state_.groups) {
      const GroupKind kind = group.expert ? GroupKind::kExpertData : GroupKind::kZero;
      std::vector<int64_t> members;
      for (const int rank : group_of(place_.topology, kind, rank_of(place_.topology, place_.at))) {
        members.push_back(rank);
      }
      const auto one = [&](const std::string& text) {
        return pickle().list({pickle().string(text)});
      };
      const std::string name = expert_group_name(place_.topology);
      list.push_back(
          builder_.dict({{"sub_group", pickle().integer(static_cast<int64_t>(list.size()))},
                         {"partition_count", pickle().integer(ranks_of(group))},
                         {"partition_rank", pickle().integer(rank_in(group))},
                         {"partition_ranks", integers(members)},
                         {"families", one(group.expert ? "autoep_expert" : "replicated")},
                         {"group_names", one(group.expert ? name : "replicated")}}));
    }
    return pickle().list(std::move(list));
  }

  // Where this rank's pieces stand in its partition.
  NodeId slice_map(const TrainedGroup& group) {
    std::vector<NodeId> items;
    for (const BufferPiece& piece : group.pieces) {
      if (piece.count == 0) continue;
      ObjectParts parts;
      parts.newobj = true;
      parts.callable = pickle().global("deepspeed.utils.tensor_fragment", "fragment_address");
      parts.args = pickle().tuple({});
      parts.state = builder_.dict(
          {{"numel", pickle().integer(piece.count)},
           {"start",
            pickle().integer(mutant("slice_start_in_parameter") ? piece.begin : piece.at)}});
      items.push_back(pickle().string(parameter(piece.parameter).module_name));
      items.push_back(pickle().object(std::move(parts)));
    }
    return pickle().ordered_dict(std::move(items));
  }

  NodeId base_state() {
    std::vector<NodeId> states;
    std::vector<std::vector<int64_t>> members;
    for (size_t g = 0; g < state_.groups.size(); ++g) {
      const TrainedGroup& group = state_.groups[g];
      members.push_back({static_cast<int64_t>(g)});
      if (!stepped()) continue;
      Entries entry;
      if (state_.counts_steps) entry.emplace_back("step", step_tensor());
      for (const auto& [name, values] : group.states) {
        entry.emplace_back(name, tensor(values, {group.buffer_size}, DType::kFloat32));
      }
      states.push_back(pickle().integer(static_cast<int64_t>(g)));
      states.push_back(builder_.dict(std::move(entry)));
    }
    return builder_.dict(
        {{"state", pickle().dict(std::move(states))}, {"param_groups", param_groups(members)}});
  }

  NodeId stage_enum() {
    return pickle().reduce("deepspeed.runtime.zero.config", "ZeroStageEnum",
                           {pickle().integer(state_.stage)});
  }

  void add_scaler(Entries* entries) {
    const LossScale& scale = state_.loss_scale;
    Entries fields = {{"cur_scale", pickle().real(scale.scale)},
                      {"dynamic", pickle().boolean(scale.dynamic)}};
    if (scale.dynamic) {
      for (const auto& [key, value] :
           Entries{{"cur_iter", pickle().integer(scale.iteration)},
                   {"last_overflow_iter", pickle().integer(scale.last_overflow)},
                   {"scale_factor", pickle().real(2.0)},
                   {"scale_window", pickle().integer(scale.window)},
                   {"min_scale", pickle().real(scale.least)},
                   {"delayed_shift", pickle().integer(scale.hysteresis)},
                   {"cur_hysteresis",
                    pickle().integer(mutant("hysteresis_not_saved") ? scale.hysteresis
                                                                    : scale.hysteresis_left)},
                   {"consecutive_hysteresis", pickle().boolean(false)},
                   {"raise_error_at_min_scale", pickle().boolean(false)},
                   {"dtype", pickle().global("torch", "float16")}}) {
        fields.emplace_back(key, value);
      }
    }
    ObjectParts parts;
    parts.newobj = true;
    parts.args = pickle().tuple({});
    parts.callable = pickle().global("deepspeed.runtime.fp16.loss_scaler",
                                     scale.dynamic ? "DynamicLossScaler" : "LossScaler");
    parts.state = builder_.dict(std::move(fields));
    entries->emplace_back("loss_scaler", pickle().object(std::move(parts)));
    entries->emplace_back("dynamic_loss_scale", pickle().boolean(scale.dynamic));
    entries->emplace_back("overflow", pickle().boolean(false));
  }
};

}  // namespace

FileBlueprint optim_file(const TrainingState& state, const RankPlace& place,
                         const SaveContent& content) {
  return OptimFile(state, place, content).run();
}

}  // namespace isoshard::engine
