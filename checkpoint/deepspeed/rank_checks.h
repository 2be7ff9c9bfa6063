// What the files of a partition group's ranks must say alike.
#pragma once

#include "checkpoint/deepspeed/model_states.h"

namespace isoshard::checkpoint {

// Every rank's optimizer stands at the same step, or Error(kMismatch).
void check_scalars(const ShardedState& state);

// What ranks above 0 hold of their own at stage 3: client state is listed in own_client_state,
// buffers that differ from rank 0's (of `model`) in `skipped`.
void compare_ranks(ShardedState* state, const ModelStates& model);

}  // namespace isoshard::checkpoint
