// What a DeepSpeed config says of the run that is to go on: `reshard --to-config` writes for it,
// `inspect --to-config` compares its degrees and stage with those of a checkpoint.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "checkpoint/sharded_state.h"
#include "core/topology.h"
#include "tools/session.h"

namespace isoshard::tools {

// zero_optimization.stage, sequence_parallel_size, tensor_parallel.autotp_size, pipeline.stages,
// and expert_parallel.autoep_size where AutoEP is enabled. Error(kUsage) for values of other types.
TargetSpec spec_from_config(Session* session, const std::string& file);

// dp, from the number of ranks: what sp, tp and pp leave of it; pp is the source's if the config
// has none. Error(kUsage) where they do not divide it, or AutoEP is enabled for native MoE.
void share_world(const checkpoint::ShardedState& source, const std::string& file, int world,
                 TargetSpec* spec);

// Whether the target's degrees and form of stage are those of the checkpoint, as a regular load
// (load_checkpoint without load_universal) needs; it needs more than that, which is not compared
// (optimizer, dtype, round robin, sub-groups, AutoEP on or off): {fits, differs: [texts], command}.
// deepspeed/runtime/engine.py, _load_checkpoint.
nlohmann::json regular_load(const checkpoint::ShardedState& source, const TargetSpec& spec);

}  // namespace isoshard::tools
