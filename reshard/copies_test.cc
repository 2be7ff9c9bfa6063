// Copies are compared by their bits, whatever pieces the two sides lie in.
#include "reshard/copies.h"

#include <gtest/gtest.h>

#include <limits>

#include "core/cast.h"
#include "reshard/copies_case.h"

namespace isoshard::reshard {
namespace {

using checkpoint::ShardedState;

CopyReport compare(const ShardedState& state) {
  std::vector<std::string> orphans;
  return compare_copies(state, copy_pairs(state, &orphans), 2);
}

TEST(Copies, RoundedMastersAgreeOverManySteps) {
  std::vector<float> masters;
  std::vector<uint16_t> copies;
  for (int i = 0; i < 600'001; ++i) {
    masters.push_back(1.0f / static_cast<float>(i + 1));
    copies.push_back(bfloat16_from_float(masters.back()));
  }
  const CopyReport report = compare(state_of(masters, copies));
  EXPECT_TRUE(report.differences.empty());
  EXPECT_EQ(report.elements, 600'001);
  copies[500'000] ^= 1;
  copies[600'000] ^= 1;
  const CopyReport damaged = compare(state_of(masters, copies));
  ASSERT_EQ(damaged.differences.size(), 1u);
  EXPECT_EQ(damaged.differences[0].index, "[500000]");
  EXPECT_EQ(damaged.differences[0].differing, 2);
}

TEST(Copies, NanAgreesWithEveryNanAndSignedZerosDoNot) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(compare(state_of({nan, 0.0f}, {0xFFFF, 0})).differences.empty());
  EXPECT_EQ(compare(state_of({1.0f, 0.0f}, {0x3F80, 0x8000})).differences.size(), 1u);
}

TEST(Copies, ATiedNameWithOtherBitsIsFoundAndOneWithoutTargetIsAnOrphan) {
  const ShardedState state = state_with_ties();
  std::vector<std::string> orphans;
  const std::vector<CopyPair> pairs = copy_pairs(state, &orphans);
  EXPECT_EQ(orphans, std::vector<std::string>{"\"lost\" = \"nowhere\""});
  const CopyReport report = compare_copies(state, pairs, 1);
  ASSERT_EQ(report.differences.size(), 1u);
  EXPECT_EQ(report.differences[0].pair.name, "tied");
}

TEST(Copies, AnAliasOfTheSameBytesIsNoSecondCopy) {
  ShardedState state = state_of({1.0f, 2.0f}, {0x3F80, 0x4000});
  const int same = state.add_leaf(state.leaf(state.parameters[0].model_copy));
  state.aliases = {{"tied", "w", same}};
  std::vector<std::string> orphans;
  EXPECT_EQ(copy_pairs(state, &orphans).size(), 1u);
}

}  // namespace
}  // namespace isoshard::reshard
