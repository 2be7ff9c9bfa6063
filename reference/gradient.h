// Gradients on their way to those who own them: leaves of tokens, added in the canonical order
// whatever ranks and micro steps they come from (tier B).
//
//   leaf (sample, position) of row r  →  node of this rank's frontier  →  all_to_all of the slices
//   that each member owns  →  root
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "core/canonical_sum.h"
#include "core/communicator.h"
#include "reference/contraction.h"

namespace isoshard::reference {

// A parameter's gradient as `rows` sums of vectors. A row has leaves of its own: one row of the
// embedding, one expert; other parameters are one row.
class Gradient {
 public:
  Gradient(const std::vector<TreeNode>& nodes, int64_t rows, int64_t width);
  float* push(int64_t row, LeafIndex leaf) {
    return sums_[static_cast<size_t>(row)].push_leaf(leaf);
  }
  int64_t rows() const { return static_cast<int64_t>(sums_.size()); }
  int64_t width() const { return width_; }
  int64_t numel() const { return rows() * width_; }
  // By row; the gradient is empty afterwards.
  std::vector<Partial> finish();

 private:
  int64_t width_;
  std::vector<PartialSum> sums_;
};

// What a rank contributes to one parameter's sum: by row.
using Contribution = std::vector<Partial>;

struct ReduceItem {
  const Contribution* mine = nullptr;
  int64_t rows = 1;
  int64_t width = 1;
  std::vector<Span> slices;  // elements that each member of the group owns
};

// The roots of this rank's slices, one an item. `nodes` are the frontiers of the members, the same
// for all items. Two all_to_alls: which nodes are there, and their values.
std::vector<Values> reduce_to_owners(Communicator& group,
                                     const std::vector<std::vector<TreeNode>>& nodes,
                                     const std::vector<ReduceItem>& items);

}  // namespace isoshard::reference
