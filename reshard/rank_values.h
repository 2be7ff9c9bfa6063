// What the file of every rank repeats: steps, param groups, loss scaler, schedule, counters,
// config, client state; at stage 3 buffers too. Each file is read by itself, so that a value which
// stands alone is told even where the folder as a whole is refused for it.
//
//   mp_rank_00_model_states.pt                      global_steps 3 ┐ alike
//   mp_rank_01_model_states.pt                      global_steps 3 ┘
//   bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt  …state[0].step 4, of the others 3
//
// Left out, because ranks rightly differ there: names, shapes and slices of their own parameters,
// paddings, who they are (folding, ds_autoep_layers). Not verified: whether a value is right.
#pragma once

#include <string>

#include "core/storage.h"
#include "reshard/replicas.h"

namespace isoshard::reshard {

// Adds kValue, kClientState and kBuffer. A file that cannot be read goes to `uncompared`: whoever
// reads the folder says what is wrong with it.
void compare_rank_values(Storage& storage, const std::string& folder, ReplicaReport* report);

}  // namespace isoshard::reshard
