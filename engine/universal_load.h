// A rank's state from a universal folder (DeepSpeed's load_universal; deepspeed/checkpoint/
// universal_checkpoint.py, load_hp_checkpoint_state), whatever the ranks and the stage that saved
// it. Unlike DeepSpeed, stages 2 and 3 take each other's.
#pragma once

#include <string>

#include "core/storage.h"
#include "engine/checkpoint.h"

namespace isoshard::engine {

// `folder`: the tag's, as `latest_universal` names it. Throws Error(kMismatch) where a parameter is
// not there or has another shape, Error(kUsage) where the folder is no universal one.
LoadResult load_universal(Storage& storage, const std::string& folder, const LoadOptions& options,
                          TrainingState* state);

}  // namespace isoshard::engine
