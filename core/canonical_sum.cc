// See canonical_sum.h. The tree is never built: two neighbours on the stack are added as soon as
// the node above them cannot receive another leaf.
#include "core/canonical_sum.h"

#include <algorithm>
#include <bit>

#include "core/check.h"
#include "core/mutant.h"

namespace isoshard {
namespace {

// Level of the lowest node that covers both.
int common_level(LeafIndex a, LeafIndex b) { return std::bit_width(a ^ b); }

}  // namespace

std::vector<TreeNode> frontier(const std::vector<LeafRange>& owned) {
  std::vector<LeafRange> ranges;
  for (const LeafRange& range : owned) {
    CHECK(range.begin <= range.end, "a range ends before it begins");
    if (range.begin == range.end) continue;
    CHECK(ranges.empty() || ranges.back().end <= range.begin, "ranges overlap or are not sorted");
    if (!ranges.empty() && ranges.back().end == range.begin)
      ranges.back().end = range.end;
    else
      ranges.push_back(range);
  }
  std::vector<TreeNode> nodes;
  for (const LeafRange& range : ranges) {
    for (LeafIndex at = range.begin; at < range.end;) {
      const int fits = std::bit_width(range.end - at) - 1;
      const int level = mutant("frontier_of_leaves") ? 0
                        : at == 0                    ? fits
                                                     : std::min(fits, std::countr_zero(at));
      nodes.push_back({level, at >> level});
      at += LeafIndex{1} << level;
    }
  }
  return nodes;
}

void TreeSum::merge_top() {
  const size_t depth = stack_.size();
  float* sum = values_at(depth - 2);
  const float* term = values_at(depth - 1);
  for (size_t i = 0; i < width_; ++i) sum[i] += term[i];
  stack_[depth - 2].last = stack_[depth - 1].last;
  stack_.pop_back();
}

float* TreeSum::push(TreeNode node) {
  const LeafIndex first = node.first_leaf();
  if (!stack_.empty()) {
    CHECK(stack_.back().last < first || mutant("sum_leaf_twice"),
          "leaves come in ascending order, each once");
    while (stack_.size() > 1 &&
           (mutant("sum_in_order") ||
            common_level(stack_[stack_.size() - 2].first, stack_.back().first) <
                common_level(stack_.back().first, first))) {
      merge_top();
    }
  }
  stack_.push_back({first, node.last_leaf()});
  const size_t room = stack_.size() * width_;
  if (values_.size() < room) values_.resize(std::max(room, 2 * values_.size()));
  return values_at(stack_.size() - 1);
}

bool TreeSum::finish(std::span<float> root) {
  CHECK(root.size() == width_, "the root has another width");
  if (stack_.empty()) {
    std::fill(root.begin(), root.end(), 0.0f);
    return false;
  }
  while (stack_.size() > 1) merge_top();
  stack_.clear();
  std::copy_n(values_.begin(), width_, root.begin());
  return true;
}

PartialSum::PartialSum(std::vector<TreeNode> nodes, size_t width)
    : width_(width), nodes_(std::move(nodes)), sums_(nodes_.size(), TreeSum(width)) {
  for (size_t k = 1; k < nodes_.size(); ++k) {
    CHECK(nodes_[k - 1].last_leaf() < nodes_[k].first_leaf(), "nodes overlap or are not sorted");
  }
}

float* PartialSum::push_leaf(LeafIndex leaf) {
  const auto next =
      std::upper_bound(nodes_.begin(), nodes_.end(), leaf,
                       [](LeafIndex l, const TreeNode& node) { return l < node.first_leaf(); });
  CHECK(next != nodes_.begin() && leaf <= std::prev(next)->last_leaf(), "the leaf is not owned");
  return sums_[static_cast<size_t>(std::prev(next) - nodes_.begin())].push_leaf(leaf);
}

Partial PartialSum::finish() {
  Partial result{.nodes = nodes_,
                 .present = std::vector<uint8_t>(nodes_.size()),
                 .values = std::vector<float>(nodes_.size() * width_)};
  const std::span<float> values(result.values);
  for (size_t k = 0; k < nodes_.size(); ++k) {
    result.present[k] = sums_[k].finish(values.subspan(k * width_, width_)) ? 1 : 0;
  }
  return result;
}

void PartialCombiner::add(const Partial& partial) {
  for (size_t k = 0; k < partial.nodes.size(); ++k) {
    if (partial.present[k] != 0 || mutant("sum_absent_is_zero"))
      add(partial.nodes[k], partial.values.data() + k * width_);
  }
}

bool PartialCombiner::finish(std::span<float> root) {
  const auto before = [](const Term& a, const Term& b) {
    return a.node.first_leaf() < b.node.first_leaf();
  };
  if (!std::ranges::is_sorted(terms_, before)) std::ranges::sort(terms_, before);
  for (const Term& term : terms_) std::copy_n(term.values, width_, sum_.push(term.node));
  terms_.clear();
  return sum_.finish(root);
}

}  // namespace isoshard
