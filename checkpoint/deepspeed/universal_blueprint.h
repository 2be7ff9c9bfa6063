// What ds_to_universal makes of a checkpoint (deepspeed/checkpoint/ds_to_universal.py, 0.19.8 with
// --inject_missing_state), as blueprints.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "checkpoint/blueprint.h"
#include "checkpoint/sharded_state.h"

namespace isoshard::checkpoint {

struct UniversalOptions {
  bool extra_folders = true;  // buffers, frozen parameters and aliases too (DeepSpeed ≥ 0.19.6)
  std::optional<FileBlueprint> model_file = {};  // instead of what the source's model file becomes
  bool beyond_deepspeed = false;                 // what its converter has no code for
  bool plain_alignment = false;  // param_alignment_paddings: zero for each parameter of the state
};

// A stage-0 source, which DeepSpeed's converter refuses, gets the files of a stage-1 one.
// Paths are relative to the universal folder. Throws Error(kUsage, kUnsupported, kHostile).
TargetFiles universal_blueprints(const ShardedState& state, const UniversalOptions& options);

// The state as DeepSpeed's converter and its safe_get_full_* calls believe it to be under
// round_robin_gradients: slices of the optimizer's order over buffers that lie in another order
// (docs/deepspeed_errata.md). The same state where nothing is permuted.
ShardedState as_deepspeed_believes(const ShardedState& state);

}  // namespace isoshard::checkpoint
