// See rank_writer.h.
#include "engine/rank_writer.h"

#include "engine/expert_files.h"

namespace isoshard::engine {

using checkpoint::NodeId;

NodeId RankWriter::param_groups(const std::vector<std::vector<int64_t>>& members) {
  std::vector<NodeId> groups;
  for (size_t g = 0; g < state_.groups.size(); ++g) {
    Entries entries;
    for (const auto& [key, setting] : state_.groups[g].settings) {
      entries.emplace_back(key, setting_node(&builder_, setting));
    }
    entries.emplace_back("params", integers(members[g]));
    groups.push_back(builder_.dict(std::move(entries)));
  }
  return pickle().list(std::move(groups));
}

NodeId RankWriter::stage0_optimizer() {
  // With experts everything is copied before it is saved, and the copies want no gradient.
  const bool experts = has_experts(state_);
  std::vector<NodeId> states, masters;
  std::vector<std::vector<int64_t>> members;
  int64_t number = 0;
  for (const TrainedGroup& group : state_.groups) {
    members.emplace_back();
    std::vector<NodeId> group_masters;
    for (const BufferPiece& piece : group.pieces) {
      const Shape& shape = parameter(piece.parameter).shape;
      const auto part = [&](const std::vector<float>& values) {
        return std::span(values).subspan(static_cast<size_t>(piece.at),
                                         static_cast<size_t>(piece.count));
      };
      if (stepped()) {
        Entries entry;
        if (state_.counts_steps) entry.emplace_back("step", step_tensor());
        for (const auto& [name, values] : group.states) {
          entry.emplace_back(name, tensor(part(values), shape, DType::kFloat32));
        }
        states.push_back(pickle().integer(number));
        states.push_back(builder_.dict(std::move(entry)));
      }
      if (state_.dtype != DType::kFloat32) {  // otherwise the parameters are the masters
        const int storage = value_storage(&builder_, part(group.master), DType::kFloat32);
        group_masters.push_back(
            builder_.tensor({.shape = shape, .storage = storage, .requires_grad = !experts}));
      }
      members.back().push_back(number++);
    }
    masters.push_back(pickle().list(std::move(group_masters)));
  }
  const NodeId plain = builder_.dict(
      {{"state", pickle().dict(std::move(states))}, {"param_groups", param_groups(members)}});
  if (state_.dtype == DType::kFloat32) return plain;
  const LossScale& scale = state_.loss_scale;
  Entries entries = {{"dynamic_loss_scale", pickle().boolean(scale.dynamic)},
                     {"cur_scale", pickle().real(scale.scale)},
                     {"cur_iter", pickle().integer(state_.counters.steps)}};
  if (scale.dynamic) {
    entries.emplace_back("last_overflow_iter", pickle().integer(scale.last_overflow));
    entries.emplace_back("scale_factor", pickle().real(2.0));
    entries.emplace_back("scale_window", pickle().integer(scale.window));
  }
  entries.emplace_back("optimizer_state_dict", plain);
  entries.emplace_back("fp32_groups", pickle().list(std::move(masters)));
  return builder_.dict(std::move(entries));
}

}  // namespace isoshard::engine
