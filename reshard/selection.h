// A part of a tensor, named as numpy names it: "[2:4,0]" takes rows 2 and 3 of column 0.
#pragma once

#include <functional>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/sharded_state.h"

namespace isoshard::reshard {

struct Selection {
  Shape shape;                 // of the whole tensor
  std::vector<int64_t> begin;  // by dimension, 0 <= begin <= end <= size
  std::vector<int64_t> end;
  std::vector<bool> single;  // a plain index was given: the dimension goes away

  Shape result_shape() const;
  int64_t count() const;  // elements selected
};

Selection select_all(const Shape& shape);

// `text` is what stands between the brackets, with Python's rules for integers and a:b: negative
// numbers count from the end, ranges are cut to the tensor, missing dimensions are whole. Throws
// Error(kUsage) for anything else (steps, "…", an index outside the tensor).
Selection parse_selection(const std::string& text, const Shape& shape);

// A run of selected elements that are neighbours in the tensor; row-major numbers.
struct ElementRun {
  int64_t begin = 0;
  int64_t count = 0;
};

// The runs, in order of their elements.
void for_each_run(const Selection& selection, const std::function<void(ElementRun)>& visit);

// Hands the selected elements over in order, whole elements and at most 1 MiB at a time.
void read_selection(const checkpoint::ShardedState& state, const checkpoint::Leaf& leaf,
                    const Selection& selection,
                    const std::function<void(std::span<const std::byte>)>& visit);

// Where the selected elements lie: fragments cut to them, in order. At most `limit` are returned;
// `total` counts all.
struct SelectedFragments {
  std::vector<checkpoint::FileFragment> first;
  int64_t total = 0;
};
SelectedFragments selected_fragments(const checkpoint::Leaf& leaf, const Selection& selection,
                                     size_t limit);

}  // namespace isoshard::reshard
