// What a DeepSpeed config says of the run that is to go on: `reshard --to-config` writes for it,
// `inspect --to-config` compares it with a checkpoint.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "checkpoint/deepspeed/tensor_target.h"
#include "checkpoint/sharded_state.h"
#include "core/topology.h"
#include "tools/session.h"

namespace isoshard::tools {

struct RunConfig {
  std::string file;
  nlohmann::json keys;
  // zero_optimization.stage, sequence_parallel_size, tensor_parallel.autotp_size, pipeline.stages,
  // and expert_parallel.autoep_size where AutoEP is enabled; dp is left open.
  TargetSpec spec;
  bool autoep = false;
};

// Error(kUsage) for a value that DeepSpeed would not take, or that leaves the run in doubt.
RunConfig read_run_config(Session* session, const std::string& file);

// The run's degrees and stage: dp is what sp, tp and pp leave of `world` ranks; pp, and the tp of a
// pipeline, are the source's where the config names none. Error(kUsage) where they do not divide
// it, or AutoEP is enabled for native MoE.
TargetSpec share_world(const checkpoint::ShardedState& source, const RunConfig& run, int world);

// How AutoTP cuts heads: from --num-kv-heads (in `options`), else --model-config, else the
// config.json that a Trainer has left beside the tag.
void infer_heads(Session* session, const checkpoint::ShardedState& source, std::string model_config,
                 checkpoint::SplitOptions* options, std::vector<std::string>* inferred);

}  // namespace isoshard::tools
