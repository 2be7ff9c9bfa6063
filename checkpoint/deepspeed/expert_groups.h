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

// The state with the groups that a run with that many expert-parallel ranks forms; nothing where
// they are the same. `most` is the run's max_group_size; 0: DeepSpeed's, or none where the source
// has one group beyond it. Groups with equal hyper-parameters, one behind the other, are taken for
// one that was split; Error(kUnsupported) where the rule does not give the source's own groups, or
// an lr_scheduler counts groups whose number changes.
std::optional<ShardedState> regroup_experts(const ShardedState& state, int ranks, int64_t most,
                                            std::vector<std::string>* inferred);

// The same, whatever the source's own groups are; `most` 0: all experts of equal settings in one.
std::optional<ShardedState> group_experts_anew(const ShardedState& state, int ranks, int64_t most);

}  // namespace isoshard::checkpoint
