// Partition files → logical leaves. One function a family of files; formats in
// docs/formats/deepspeed_zero.md. The state has its files, model files and optim files open; these
// add parameters, groups and leaves. Every length is checked against core/zero_rules.h.
#pragma once

#include "checkpoint/deepspeed/model_states.h"

namespace isoshard::checkpoint {

// Stages 1 and 2, and BF16_Optimizer (stage_1_and_2.py, bf16_optimizer.py). Only the groups of the
// mask are read, all of them if it is empty: those that the state's optim files partition.
using GroupMask = std::vector<bool>;
void read_zero12(ShardedState* state, const ModelStates& model, const GroupMask& groups = {});

// Stage 3 (stage3.py). `model` is rank 0's; the other ranks' files must agree with it.
// Only the sub-groups of the mask are read, all of them if it is empty.
void read_zero3(ShardedState* state, const ModelStates& model, const GroupMask& sub_groups = {});

// Those that the ranks of `members` alone partition among them; the state's optim files are theirs.
void read_zero3_part(ShardedState* state, const ModelStates& model, const GroupMask& sub_groups,
                     const std::vector<int>& members);

// Of stage 3: the entry of ds_zero_partition_groups for a sub-group; kNoNode where the file has no
// such list, and every rank shares in every sub-group.
NodeId partition_group(const Fields& fields, NodeId optimizer, int64_t sub_group);

// Frozen parameters of stage 3: one slot a rank in the model files.
void add_frozen_slots(ShardedState* state, const ModelStates& model);

// One state dictionary of the base optimizer, sorted into flat tensors and single numbers.
struct OptimizerState {
  std::vector<std::pair<std::string, TensorView>> tensors;
  std::vector<std::pair<std::string, NodeId>> scalars;
};
OptimizerState sort_optimizer_state(const Fields& fields, NodeId entry, const std::string& what);

// The entry of a state dictionary with integer key `index`, or kNoNode.
NodeId find_index(const Pickle& pickle, NodeId mapping, int64_t index);

}  // namespace isoshard::checkpoint
