// A tensor written as runs of other tensors, one behind another: found by greedy search, the
// longest run first, each compared bit by bit from end to end.
#pragma once

#include <optional>
#include <vector>

#include "reshard/tensor_values.h"
#include "reshard/window_index.h"

namespace isoshard::reshard {

// `count` elements that equal elements [begin, begin + count) of an original; tensor −1: one value,
// repeated.
struct Run {
  int tensor = -1;
  int64_t begin = 0;
  int64_t count = 0;
  bool operator==(const Run&) const = default;
};

// The runs that make up `found`, in order, covering every element, or nothing. `own` is the number
// of the original that `found` should be, or −1. At most 64 runs.
std::optional<std::vector<Run>> cover_with_runs(const std::vector<TensorValues>& originals,
                                                const WindowIndex& index, const TensorValues& found,
                                                int own);

// Length of the longest common run of a from begin_a on and b from begin_b on.
struct RunStart {
  const TensorValues& values;
  int64_t begin = 0;
};
int64_t common_run(const RunStart& a, const RunStart& b);

}  // namespace isoshard::reshard
