// Groups of the optimizer that hold experts: DeepSpeed fills them in the parameters' order up to a
// number of elements of one rank, so that their borders depend on the expert-parallel degree
// (deepspeed/moe/utils.py, split_params_into_different_moe_groups_for_optimizer).
//
//   max_group_size 300    ep 2: [e0 e1]          ep 1: [e0 e1] [e2 e3]
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/sharded_state.h"

namespace isoshard::checkpoint {

inline constexpr int64_t kMoeMaxGroupSize =
    178'956'971;  // max_group_size, if the caller names none

struct Regrouped {
  std::optional<ShardedState> state;  // nothing: the source's groups are the target's
  bool known = true;                  // false: there is no rule for such shares of experts
};

// The groups that a run with that many expert-parallel ranks forms. `most` is the run's
// max_group_size; 0: DeepSpeed's, or none where the source has one group beyond it. Groups of
// experts (moe: True) with equal settings, one behind the other, are taken for one that was split;
// Error(kUnsupported) where the rule does not give the source's own groups, where settings differ
// between the experts of one layer, or where an lr_scheduler counts groups whose number changes.
Regrouped regroup_experts(const ShardedState& state, int ranks, int64_t most,
                          std::vector<std::string>* inferred);

// The same, whatever the source's own groups are; `most` 0: all experts of equal settings in one.
// Schedulers are not looked at.
std::optional<ShardedState> group_experts_anew(const ShardedState& state, int ranks, int64_t most);

// Error(kUnsupported) where the lr_scheduler of the state's files keeps a list by group, and their
// number changes.
void check_scheduler(const ShardedState& state, size_t before, size_t after);

}  // namespace isoshard::checkpoint
