// Whether a checkpoint fits the run of a DeepSpeed config without being resharded.
#pragma once

#include <nlohmann/json.hpp>

#include "checkpoint/sharded_state.h"
#include "core/topology.h"
#include "tools/session.h"
#include "tools/target_config.h"

namespace isoshard::tools {

// Whether a regular load (load_checkpoint without load_universal; deepspeed/runtime/engine.py,
// _load_checkpoint) of a ZeRO checkpoint in that run finds what it looks for: {fits, differs:
// [texts], not_compared: [texts], command, next}. `command` is a reshard of which all is known to
// be possible; where there is none, `next` says why. `spec` is share_world()'s.
nlohmann::json regular_load(Session* session, const checkpoint::ShardedState& source,
                            const RunConfig& run, const TargetSpec& spec);

}  // namespace isoshard::tools
