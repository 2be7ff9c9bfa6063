// Weights alone, in the model's dtype, from the model files of stages 1 and 2: no optimizer file is
// opened. What from_pretrained needs, and what a node that has no optimizer files can still give.
#pragma once

#include <vector>

#include "checkpoint/deepspeed/experts.h"
#include "checkpoint/deepspeed/model_states.h"

namespace isoshard::checkpoint {

// Adds the parameters that param_shapes names, without group and leaves; experts by their logical
// shapes and global names. `expert_files` are open. Their copies come from add_module_entries,
// add_expert_copies and add_layer_copies.
void list_parameters(ShardedState* state, const ModelStates& model, const ExpertInfo& experts,
                     const std::vector<int>& expert_files);

// The copies become the weights. Throws Error(kIncomplete) for a parameter that has none, unless it
// may come later (`all` is false).
void promote_copies(ShardedState* state, bool all = true);

}  // namespace isoshard::checkpoint
