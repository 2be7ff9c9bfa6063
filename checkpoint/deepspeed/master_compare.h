// A master against the module's copy of it: the cast of the one is the other, bit for bit.
#pragma once

#include <optional>
#include <string>

#include "checkpoint/sharded_state.h"

namespace isoshard::checkpoint {

// Where the cast of a master first differs from the module's bits.
struct Difference {
  int64_t element = 0;
  std::string expected;  // bits
  std::string found;
};

// Both tensors have one shape; can_cast() knows their dtypes. Two NaNs agree.
std::optional<Difference> compare(const ShardedState& state, const Leaf& master,
                                  const Leaf& module);

}  // namespace isoshard::checkpoint
