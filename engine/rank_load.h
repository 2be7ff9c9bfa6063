// A rank's own files read back into its buffers. The way back of rank_files.h.
#pragma once

#include <string>

#include "core/storage.h"
#include "core/training_state.h"
#include "engine/checkpoint.h"

namespace isoshard::engine {

// From the tag folder `folder`. Returns the model file's path and its client state.
LoadResult load_rank(Storage& storage, const std::string& folder, const RankPlace& place,
                     const LoadOptions& options, TrainingState* state);

}  // namespace isoshard::engine
