// What the files of a rank have in common: values, settings and param_groups as pickle nodes.
#pragma once

#include <algorithm>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "engine/pickled.h"
#include "engine/rank_files.h"

namespace isoshard::engine {

using Entries = std::vector<std::pair<std::string, checkpoint::NodeId>>;

class RankWriter {
 public:
  RankWriter(const TrainingState& state, const RankPlace& place, const SaveContent& content)
      : state_(state), place_(place), content_(content) {}

 protected:
  checkpoint::Pickle& pickle() { return builder_.pickle; }
  int ranks() const { return place_.topology.zero_ranks(); }
  // Of those who share a group's optimizer state.
  int ranks_of(const TrainedGroup& group) const {
    return group.expert ? place_.expert_data_ranks() : ranks();
  }
  int rank_in(const TrainedGroup& group) const {
    return group.expert ? place_.at.expert_data : place_.zero_rank();
  }
  const TrainedParameter& parameter(int number) const {
    return state_.parameters[static_cast<size_t>(number)];
  }
  checkpoint::NodeId integers(const std::vector<int64_t>& values) {
    std::vector<checkpoint::NodeId> items;
    for (const int64_t value : values) items.push_back(pickle().integer(value));
    return pickle().list(std::move(items));
  }
  // Of the parameters that the rank holds elements of: AutoTP leaves ranks without heads empty.
  std::vector<int> owned(const TrainedGroup& group) const {
    std::vector<int> list;
    for (const int number : group.parameters) {
      if (numel(parameter(number).shape) > 0) list.push_back(number);
    }
    return list;
  }
  int64_t total(const TrainedGroup& group) const {
    int64_t sum = 0;
    for (const int number : group.parameters) sum += numel(parameter(number).shape);
    return sum;
  }
  checkpoint::NodeId tensor(std::span<const float> values, const Shape& shape, DType dtype) {
    return builder_.tensor({.shape = shape, .storage = value_storage(&builder_, values, dtype)});
  }
  checkpoint::NodeId step_tensor() {
    const float steps = static_cast<float>(state_.counters.optimizer_steps);
    return tensor({&steps, 1}, {}, DType::kFloat32);
  }
  bool stepped() const { return state_.counters.optimizer_steps > 0; }

  checkpoint::NodeId param_groups(const std::vector<std::vector<int64_t>>& members);
  // The torch optimizer's own form, and around it what FP16_UnfusedOptimizer adds where parameters
  // have masters of their own.
  checkpoint::NodeId stage0_optimizer();

  const TrainingState& state_;
  const RankPlace& place_;
  const SaveContent& content_;
  checkpoint::TorchBuilder builder_;
};

}  // namespace isoshard::engine
