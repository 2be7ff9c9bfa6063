#include "core/canonical_sum.h"

#include <gtest/gtest.h>

#include <bit>
#include <map>
#include <optional>

#include "core/check.h"
#include "core/random.h"

namespace isoshard {
namespace {

using Leaves = std::map<LeafIndex, float>;

// The definition, word for word.
std::optional<float> node(const Leaves& leaves, int level, LeafIndex index) {
  if (level == 0) {
    const auto found = leaves.find(index);
    if (found == leaves.end()) return std::nullopt;
    return found->second;
  }
  const std::optional<float> left = node(leaves, level - 1, 2 * index);
  const std::optional<float> right = node(leaves, level - 1, 2 * index + 1);
  if (!left || !right) return left ? left : right;
  return *left + *right;
}

uint32_t bits(float value) { return std::bit_cast<uint32_t>(value); }

TEST(CanonicalSum, IsTheDefinition) {
  Random random(1);
  for (int round = 0; round < 300; ++round) {
    const int64_t count = random.between(1, 70);
    Leaves leaves;
    TreeSum sum(1);
    for (int64_t i = 0; i < count; ++i) {
      if (random.below(4) == 0) continue;
      const float value = static_cast<float>(random.between(-1000, 1000)) * 0.37f;
      leaves[static_cast<LeafIndex>(i)] = value;
      *sum.push_leaf(static_cast<LeafIndex>(i)) = value;
    }
    float root = 7;
    const bool present = sum.finish({&root, 1});
    ASSERT_EQ(present, !leaves.empty());
    ASSERT_EQ(bits(root), bits(node(leaves, 7, 0).value_or(0.0f)));
  }
}

TEST(CanonicalSum, ALeafThatIsAbsentIsNotZero) {
  TreeSum sum(1);
  *sum.push_leaf(5) = -0.0f;
  float root = 1;
  EXPECT_TRUE(sum.finish({&root, 1}));
  EXPECT_EQ(bits(root), bits(-0.0f));
  EXPECT_FALSE(sum.finish({&root, 1}));
  EXPECT_EQ(bits(root), bits(0.0f));
}

// Owners that have no leaf of a node say so; nothing is added for them.
TEST(CanonicalSum, AnOwnerWithoutLeavesIsNotZero) {
  PartialSum first({{1, 0}}, 1), second({{1, 1}}, 1);
  *first.push_leaf(1) = -0.0f;
  const Partial own = first.finish(), nothing = second.finish();
  EXPECT_EQ(nothing.present, std::vector<uint8_t>{0});
  PartialCombiner combiner(1);
  combiner.add(own);
  combiner.add(nothing);
  float root = 1;
  EXPECT_TRUE(combiner.finish({&root, 1}));
  EXPECT_EQ(bits(root), bits(-0.0f));
}

TEST(CanonicalSum, FrontierHasTheFewestNodes) {
  EXPECT_EQ(frontier({{0, 341}}).size(), 5u);
  EXPECT_EQ(frontier({{0, 384}}).size(), 2u);
  EXPECT_EQ(frontier({{384, 704}}).size(), 3u);
  EXPECT_EQ(frontier({{704, 1024}}).size(), 2u);
  EXPECT_EQ(frontier({{0, 3}, {3, 8}}), (std::vector<TreeNode>{{3, 0}}));
  EXPECT_TRUE(frontier({{4, 4}}).empty());
  EXPECT_THROW(frontier({{0, 4}, {3, 5}}), CheckFailure);
}

TEST(CanonicalSum, LeavesOutOfOrderAreOurMistake) {
  TreeSum sum(1);
  sum.push_leaf(3);
  EXPECT_THROW(sum.push_leaf(3), CheckFailure);
  EXPECT_THROW(sum.push({2, 0}), CheckFailure);
  PartialSum partial({{2, 0}}, 1);
  EXPECT_THROW(partial.push_leaf(4), CheckFailure);
}

TEST(CanonicalSum, PositionsOfASampleComeFirst) {
  const float a = 16777216.0f, b = 1.0f, c = 1.0f;
  TreeSum sum(1);
  *sum.push_leaf(token_leaf(0, 0)) = a;
  *sum.push_leaf(token_leaf(1, 0)) = b;
  *sum.push_leaf(token_leaf(1, 1)) = c;
  float root = 0;
  sum.finish({&root, 1});
  EXPECT_EQ(root, a + (b + c));
  EXPECT_NE(root, (a + b) + c);
}

}  // namespace
}  // namespace isoshard
