// What a whole comparison proves: that one side is the other as DeepSpeed misreads it, and which
// side the model's own weights speak for.
#pragma once

#include <string>
#include <vector>

#include "reshard/executor.h"
#include "reshard/logical_leaves.h"

namespace isoshard::reshard {

// One side of a comparison.
struct DiffSide {
  std::string letter;  // "A" or "B"
  const checkpoint::ShardedState& state;
  LogicalLeaves leaves;
  std::vector<LeafCrc> crcs;  // by leaf number
};

// Not empty when every optimizer-owned leaf of `other` is bit for bit what as_deepspeed_believes()
// makes of `source`, which must have been saved with round_robin_gradients.
std::string round_robin_reason(Storage& storage, const DiffSide& source, const DiffSide& other,
                               const StreamOptions& stream);

// Not empty when one side's masters, cast to the model's dtype, are the weights that the model
// itself saved, for all of `names`, and the other side's are not.
std::string which_is_right(const DiffSide& a, const DiffSide& b,
                           const std::vector<std::string>& names);

}  // namespace isoshard::reshard
