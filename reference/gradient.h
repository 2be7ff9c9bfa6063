// Gradients on their way to those who own them: leaves of tokens, added in the canonical order
// whatever ranks and micro steps they come from (tier B).
//
//   leaf (sample, position) of row r  →  node of this rank's frontier  →  all_to_all of the slices
//   that each member owns  →  root
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/canonical_sum.h"
#include "core/communicator.h"
#include "reference/contraction.h"

namespace isoshard::reference {

// How gradients are added: both do not depend on who owns which leaves, and differ from each other
// in the last bits. The mode belongs to the run, never to the topology.
enum class ReduceMode {
  kTree,   // core/canonical_sum.h
  kFixed,  // int64 multiples of 2^-exponent, one exponent a tensor: any order, any collective
};

// The sum of one tensor's leaves in fixed point. A leaf's element x adds the integer nearest to
// x · 2^exponent, ties to even.
class FixedSum {
 public:
  explicit FixedSum(int64_t numel) : sums_(static_cast<size_t>(numel), 0) {}

  // Room for `width` values that are added at element `at` by the next call of push() or settle().
  float* push(int64_t at, int64_t width);
  void settle();
  // Forgets what was added. `leaves` of what comes, multiplied by 2^exponent, are never more than
  // an int64 holds; a larger element saturates the sum, whoever has it.
  void restart(int exponent, int64_t leaves);

  // The sums of another rank.
  void take(std::vector<int64_t> sums, int exponent) {
    sums_ = std::move(sums);
    exponent_ = exponent;
  }

  // The largest |x| so far; infinite if one was not a number.
  float largest() const { return largest_; }
  // An element left that range, and was left out.
  bool saturated() const { return saturated_; }
  const std::vector<int64_t>& sums() const { return sums_; }
  int exponent() const { return exponent_; }

  // For sums of up to `leaves` leaves, none above `largest` (finite, > 0), with room for 16 times
  // that: 61 − ⌈log2 leaves⌉ − ⌈log2 largest⌉ − 4.
  static int exponent_for(int64_t leaves, float largest);

 private:
  std::vector<int64_t> sums_;
  std::vector<float> pending_;
  int64_t pending_at_ = 0;
  int exponent_ = 0;
  double limit_ = 0x1p32;  // of one element
  float largest_ = 0.0f;
  bool saturated_ = false;
};

// A parameter's gradient as `rows` sums of vectors. A row has leaves of its own: one row of the
// embedding, one expert; other parameters are one row.
class Gradient {
 public:
  Gradient(ReduceMode mode, const std::vector<TreeNode>& nodes, int64_t rows, int64_t width);
  float* push(int64_t row, LeafIndex leaf) {
    if (fixed_) return fixed_->push(row * width_, width_);
    return sums_[static_cast<size_t>(row)].push_leaf(leaf);
  }
  int64_t rows() const { return rows_; }
  int64_t width() const { return width_; }
  int64_t numel() const { return rows() * width_; }
  // kTree: by row; the gradient is empty afterwards.
  std::vector<Partial> finish();
  // kFixed.
  FixedSum& fixed() { return *fixed_; }

 private:
  int64_t rows_, width_;
  std::optional<FixedSum> fixed_;
  std::vector<PartialSum> sums_;
};

// What a rank contributes to one parameter's sum: by row.
using Contribution = std::vector<Partial>;

struct ReduceItem {
  const Contribution* mine = nullptr;
  int64_t rows = 1;
  int64_t width = 1;
  const std::vector<Span>* slices = nullptr;  // elements that each member of the group owns
};

// The roots of this rank's slices, one an item. `nodes` are the frontiers of the members, the same
// for all items. Two all_to_alls: which nodes are there, and their values.
std::vector<Values> reduce_to_owners(Communicator& group,
                                     const std::vector<std::vector<TreeNode>>& nodes,
                                     const std::vector<ReduceItem>& items);

// The same for sums in fixed point: one reduce_scatter of integers. `slices` as ReduceItem's.
struct FixedItem {
  const FixedSum* mine = nullptr;
  const std::vector<Span>* slices = nullptr;
};
std::vector<Values> reduce_fixed(Communicator& group, const std::vector<FixedItem>& items);

}  // namespace isoshard::reference
