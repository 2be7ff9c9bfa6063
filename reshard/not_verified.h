// What no pass over a checkpoint can tell, case by case: the other half of a verdict.
#pragma once

#include "reshard/verify.h"

namespace isoshard::reshard {

// Adds to result->not_verified; reads result->copies. `manifest_holds`: each file has the size and
// hash that isoshard wrote down; `replicas`: the copies of ranks were compared, too.
void say_what_is_not_verified(const checkpoint::ShardedState& state, bool manifest_holds,
                              bool replicas, Verification* result);

}  // namespace isoshard::reshard
