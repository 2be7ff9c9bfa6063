// Whether a universal folder has every state of every parameter.
#pragma once

#include "checkpoint/deepspeed/reader.h"

namespace isoshard::checkpoint {

// Every parameter of a group has the group's states, tensors and numbers alike; what isoshard left
// out, its folder's manifest does not list. Error(kIncomplete) for the first that is missing, or a
// notice with ReadOptions::lost_experts.
void check_universal_states(ShardedState* state, Storage& storage, const ReadOptions& options);

}  // namespace isoshard::checkpoint
