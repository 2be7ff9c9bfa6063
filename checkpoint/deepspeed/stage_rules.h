// The rules by which a PipelineModule may have cut its layers, for the layers of a checkpoint
// (deepspeed/runtime/pipe/module.py, _partition_layers).
#pragma once

#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "checkpoint/sharded_state.h"
#include "core/affine_map.h"

namespace isoshard::checkpoint {

constexpr int kMostInferred = 1024;  // layers; the balanced rules take the square of them

using TiedUses = std::map<std::string, std::set<int>>;  // layers that use a tied module, by key

struct StageRule {
  std::string name;  // of the partition_method
  // Bounds, by number of stages; each tensor-parallel rank counts its own elements.
  std::function<std::vector<int>(int)> source, target;
};

// Those of one partition_method, or, if it is empty, all: type:REGEX as any class of layers alike
// in names and shapes may be named by it. Above kMostInferred layers: uniform alone. `maps` are
// those of the target's tensor-parallel ranks, by parameter; empty: there is one.
std::vector<StageRule> stage_rules(const ShardedState& state, int layers, const TiedUses& uses,
                                   const std::string& method, const std::vector<AffineMap>& maps);

}  // namespace isoshard::checkpoint
