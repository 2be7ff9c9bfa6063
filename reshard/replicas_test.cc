// Who is alone among copies, and how one differs from the others.
#include "reshard/replicas.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "reshard/bit_difference.h"
#include "reshard/copies_case.h"

namespace isoshard::reshard {
namespace {

using checkpoint::ShardedState;

ReplicaDifference voted(const std::vector<std::string>& contents) {
  ReplicaDifference result;
  vote(contents, &result);
  return result;
}

TEST(Vote, TheLastOfManyIsAlone) {
  const ReplicaDifference result = voted({"a", "a", "a", "b"});
  EXPECT_TRUE(result.majority);
  EXPECT_EQ(result.groups, (std::vector<std::vector<int>>{{0, 1, 2}, {3}}));
}

TEST(Vote, TheFirstMayBeTheOneThatIsAlone) {
  const ReplicaDifference result = voted({"b", "a", "a"});
  EXPECT_TRUE(result.majority);
  EXPECT_EQ(result.groups, (std::vector<std::vector<int>>{{1, 2}, {0}}));
}

TEST(Vote, TiesHaveNoMajority) {
  EXPECT_FALSE(voted({"a", "b"}).majority);
  EXPECT_FALSE(voted({"a", "b", "b", "a"}).majority);
  EXPECT_FALSE(voted({"a", "b", "c"}).majority);
  EXPECT_FALSE(voted({"a", "a"}).majority);
}

std::string how(uint32_t expected, uint32_t found) {
  BitDifference bits(DType::kFloat32);
  bits.add(std::as_bytes(std::span(&expected, 1)), std::as_bytes(std::span(&found, 1)));
  return bits.text();
}

TEST(BitDifference, SaysWhatDiffers) {
  EXPECT_EQ(how(0, 0x80000000), "the sign of zero alone");
  EXPECT_EQ(how(0x7FC00000, 0xFFC00001), "payloads of NaN alone");
  EXPECT_EQ(how(0x3F800000, 0x3F800001), "one bit (bit 0), at most 1 ulp");
  EXPECT_EQ(how(0x3F800003, 0x3F800000), "at most 3 ulp");
  EXPECT_EQ(how(0x3F800003, 0), "zeros instead of values");
  EXPECT_EQ(how(0x3F800003, 0x7FC00000), "no near values");
}

// Three copies of three bfloat16 numbers, one behind the other.
ShardedState three_copies(const std::vector<uint16_t>& numbers) {
  ShardedState state = state_of({}, numbers);
  state.parameters.clear();
  for (int i = 0; i < 3; ++i) {
    const int leaf = state.add_leaf({.name = "w",
                                     .state = i == 0 ? "param" : "tp rank " + std::to_string(i),
                                     .dtype = DType::kBFloat16,
                                     .shape = {3},
                                     .fragments = {{0, 3, 0, 6 * i}}});
    if (i > 0) state.replicas.emplace_back(leaf - i, leaf);
  }
  return state;
}

TEST(Replicas, ADtypeOfItsOwnIsTold) {
  for (int alone = 0; alone < 3; ++alone) {
    ShardedState state = three_copies({1, 2, 3, 1, 2, 3, 1, 2, 3});
    const auto last = static_cast<int>(state.leaves.size()) - 3;
    state.leaf(last + alone).dtype = DType::kFloat16;
    // The two others are compared bit for bit.
    const std::vector<TensorSet> sets = replica_sets(state);
    ASSERT_EQ(sets.size(), 1u);
    EXPECT_EQ(sets[0].leaves.size(), 2u);
    EXPECT_EQ(std::ranges::count(sets[0].leaves, last + alone), 0);
    ReplicaReport report;
    compare_dtypes(state, &report);
    ASSERT_EQ(report.differences.size(), 1u);
    const ReplicaDifference& difference = report.differences[0];
    EXPECT_TRUE(difference.majority && difference.judged);
    EXPECT_EQ(difference.groups[1], std::vector<int>{alone});
    EXPECT_EQ(difference.contrasts[0].found, "float16");
    EXPECT_EQ(tell_replicas(report).findings.size(), 1u);
  }
}

// What plain verify says of a pair may be left out only where the pair is in a set.
TEST(Replicas, OnlyPairsOfASetAreToldBySets) {
  ShardedState state = three_copies({1, 2, 3, 1, 2, 3, 1, 2, 3});
  const auto last = static_cast<int>(state.leaves.size()) - 3;
  state.leaf(last + 2).dtype = DType::kFloat16;
  EXPECT_TRUE(in_a_set(state, {CopyPair::Kind::kReplica, "w", last, last + 1}));
  EXPECT_FALSE(in_a_set(state, {CopyPair::Kind::kReplica, "w", last, last + 2}));
  EXPECT_FALSE(in_a_set(state, {CopyPair::Kind::kMaster, "w", last, last + 1}));
  ReplicaReport report;
  compare_dtypes(three_copies({1, 2, 3, 1, 2, 3, 1, 2, 3}), &report);
  EXPECT_TRUE(report.differences.empty());
}

TEST(Replicas, PairsOfOneOriginalAreOneSet) {
  const std::vector<uint16_t> numbers = {1, 2, 3, 1, 2, 3, 1, 2, 3};
  const ShardedState state = three_copies(numbers);
  const std::vector<TensorSet> sets = replica_sets(state);
  ASSERT_EQ(sets.size(), 1u);
  EXPECT_EQ(sets[0].leaves.size(), 3u);
  ReplicaReport report;
  compare_sets(state, sets, {}, 2, &report);
  EXPECT_TRUE(report.differences.empty());
  EXPECT_EQ(report.of(ReplicaKind::kTensor).copies, 3);
}

TEST(Replicas, EachCopyIsFoundWhereItIsAlone) {
  for (int alone = 0; alone < 3; ++alone) {
    std::vector<uint16_t> numbers = {1, 2, 3, 1, 2, 3, 1, 2, 3};
    numbers[static_cast<size_t>(3 * alone + 1)] = 10;
    const ShardedState state = three_copies(numbers);
    ReplicaReport report;
    compare_sets(state, replica_sets(state), {}, 1, &report);
    ASSERT_EQ(report.differences.size(), 1u);
    const ReplicaDifference& difference = report.differences[0];
    EXPECT_TRUE(difference.majority);
    EXPECT_EQ(difference.groups[1], std::vector<int>{alone});
    EXPECT_EQ(difference.contrasts[0].index, "[1]");
    EXPECT_EQ(difference.contrasts[0].offset_bytes, 6 * alone + 2);
    EXPECT_EQ(tell_replicas(report).findings.size(), 1u);
  }
}

}  // namespace
}  // namespace isoshard::reshard
