// Which parameters each pipeline stage of a target holds (deepspeed/runtime/pipe/module.py,
// _partition_layers and _build). No file says where a stage ends, how many layers there are, or
// which layers use a tied module without a file of their own: it is told, or every way that
// explains the source's own stages must give the same.
#pragma once

#include <map>
#include <set>
#include <string>
#include <vector>

#include "checkpoint/sharded_state.h"

namespace isoshard::checkpoint {

struct StageOptions {
  std::vector<int> parts;                     // --pp-parts: PipelineModule's; empty: not told
  std::string method;                         // --partition-method uniform or parameters
  int layers = 0;                             // --num-layers; 0: not told
  std::map<std::string, std::set<int>> tied;  // --tied-layers: layers by key
};

struct StagePlan {
  std::vector<std::vector<int>> held;             // by stage: parameters, in the groups' order
  std::vector<std::vector<std::string>> buffers;  // by stage: buffer_names
  bool operator==(const StagePlan&) const = default;
};

// For `stages` stages of a checkpoint of a PipelineModule. Throws Error(kUsage) where the stages
// are not determined or what is told contradicts the source, and Error(kUnsupported) where the
// optimizer's order is not the modules'. `maps`: of the target's tensor-parallel ranks, by
// parameter; empty: there is one. What was inferred goes to `inferred`.
StagePlan plan_stages(const ShardedState& state, int stages, const StageOptions& options,
                      const std::vector<AffineMap>& maps, std::vector<std::string>* inferred);

}  // namespace isoshard::checkpoint
