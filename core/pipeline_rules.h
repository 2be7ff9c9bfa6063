// Which layers a pipeline stage holds, by PipelineModule's partition_method (deepspeed/runtime/
// utils.py, partition_uniform and partition_balanced). Both give `stages` + 1 bounds: stage s holds
// layers [bounds[s], bounds[s + 1]).
//
//   uniform      7 layers over 3 stages → 0 3 5 7
//   parameters   the stages' numbers of trained elements differ as little as they can
#pragma once

#include <cstdint>
#include <vector>

namespace isoshard {

// The first stages take the remainder.
std::vector<int> uniform_parts(int layers, int stages);

// Least difference between the heaviest and the lightest stage, as DeepSpeed's dynamic program
// finds it: stage by stage from the costs of its prefixes, and of equal costs the last cut.
// O(layers² · stages).
std::vector<int> balanced_parts(const std::vector<int64_t>& weights, int stages);

}  // namespace isoshard
