// Sums whose bits do not depend on who holds which summand. Every leaf of a sum has a global index;
// the tree over the indices is fixed, and ranks, shards and micro batches only say who owns which
// leaves:
//
//   node(0, i) = leaf i                 level 2        ┌──── 0 ────┐
//   node(k, j) = node(k−1, 2j)          level 1     ┌─ 0 ─┐     ┌─ 1 ─┐
//              + node(k−1, 2j+1)        leaves      0     1     2     3
//
// A leaf that does not exist (a masked token, a token that another expert takes) is absent, not
// zero: a node with one child that is present is that child, so that −0 survives. The sum of
// nothing is +0. Leaves and nodes are float32; rounding to another type and every factor come after
// the root. A leaf may be a vector, which is summed element by element.
//
// What is not promised: the payload of a NaN that comes out of an addition.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace isoshard {

using LeafIndex = uint64_t;

// Tokens: the inner tree runs over the positions of a sample, the outer one over the samples.
constexpr int kPositionBits = 24;
constexpr LeafIndex token_leaf(int64_t sample, int64_t position) {
  return (static_cast<LeafIndex>(sample) << kPositionBits) | static_cast<LeafIndex>(position);
}

// Leaves [begin, end).
struct LeafRange {
  LeafIndex begin = 0;
  LeafIndex end = 0;
  bool operator==(const LeafRange&) const = default;
};

// Covers leaves [index << level, (index + 1) << level).
struct TreeNode {
  int level = 0;
  LeafIndex index = 0;
  LeafIndex first_leaf() const { return index << level; }
  LeafIndex last_leaf() const { return first_leaf() + ((LeafIndex{1} << level) - 1); }
  bool operator==(const TreeNode&) const = default;
};

// The fewest nodes that cover exactly the owned leaves, in ascending order: what an owner can add
// up by itself. `owned` is sorted; ranges that touch are taken together.
std::vector<TreeNode> frontier(const std::vector<LeafRange>& owned);

// Adds leaves, or finished nodes, that come in ascending order. Holds as many vectors as levels.
class TreeSum {
 public:
  explicit TreeSum(size_t width) : width_(width) {}

  // Room for the `width` values of a leaf, or of a node; the caller fills it before the next call.
  // A leaf may lie in no span that was pushed before (CheckFailure).
  float* push(TreeNode node);
  float* push_leaf(LeafIndex leaf) { return push({0, leaf}); }

  bool empty() const { return stack_.empty(); }
  // Of an empty sum: the width of the next.
  void restart(size_t width) { width_ = width; }
  // The root; false, and zeros, where nothing was pushed. The sum is empty afterwards.
  bool finish(std::span<float> root);

 private:
  struct Entry {
    LeafIndex first = 0, last = 0;  // of the span
  };
  float* values_at(size_t depth) { return values_.data() + depth * width_; }
  void merge_top();

  size_t width_;
  std::vector<Entry> stack_;
  std::vector<float> values_;  // `width` for each entry, and spare room behind them
};

// One owner's share of a sum: a vector for each node of its frontier.
struct Partial {
  std::vector<TreeNode> nodes;
  std::vector<uint8_t> present;  // 0: no leaf of the node exists; its values are zeros
  std::vector<float> values;     // nodes.size() × width
};

// Adds an owner's leaves into the nodes of its frontier. The leaves of one node come in ascending
// order; those of different nodes may come in turns.
class PartialSum {
 public:
  // `nodes` are disjoint and ascending.
  PartialSum(std::vector<TreeNode> nodes, size_t width);
  // Room for a leaf's values; a node of the owner covers it (CheckFailure).
  float* push_leaf(LeafIndex leaf);
  // The sum is empty afterwards.
  Partial finish();

 private:
  size_t width_;
  std::vector<TreeNode> nodes_;
  std::vector<TreeSum> sums_;
};

// The root over all owners. Columns [first, first + root.size()) of each partial's `width`.
class PartialCombiner {
 public:
  explicit PartialCombiner(size_t width) : width_(width), sum_(width) {}
  // Begins a sum of another width; what was added is finished.
  void restart(size_t width) {
    width_ = width;
    sum_.restart(width);
  }
  // `values` lies still until finish().
  void add(TreeNode node, const float* values) { terms_.push_back({node, values}); }
  // Absent nodes are left out.
  void add(const Partial& partial);
  bool finish(std::span<float> root);

 private:
  struct Term {
    TreeNode node;
    const float* values = nullptr;
  };
  size_t width_;
  TreeSum sum_;
  std::vector<Term> terms_;
};

}  // namespace isoshard
