// The rules by which a PipelineModule may have cut its layers, for the layers of a checkpoint
// (deepspeed/runtime/pipe/module.py, _partition_layers).
#pragma once

#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "checkpoint/sharded_state.h"

namespace isoshard::checkpoint {

constexpr int kMostInferred = 1024;  // layers; the balanced rules take the square of them

using TiedUses = std::map<std::string, std::set<int>>;  // layers that use a tied module, by key

struct StageRule {
  std::string name;                            // of the partition_method
  std::function<std::vector<int>(int)> parts;  // bounds, by number of stages
};

// Those of one partition_method, or, if it is empty, all: type:REGEX as any class of layers alike
// in names and shapes may be named by it. Above kMostInferred layers: uniform alone.
std::vector<StageRule> stage_rules(const ShardedState& state, int layers, const TiedUses& uses,
                                   const std::string& method);

}  // namespace isoshard::checkpoint
