// The worked examples of DeepSpeed's partitioning, and the fixtures' numbers. Model M: group 0 has
// parameters of 35, 15 and 15 elements (T = 65), group 1 one of 3.
#include "core/zero_rules.h"

#include <gtest/gtest.h>

#include <vector>

namespace isoshard {
namespace {

struct FlatRow {
  int64_t total;
  int dp;
  int64_t flat, partition;
  std::vector<int64_t> paddings;
  std::vector<int64_t> bf16_paddings;
};

const FlatRow kFlatRows[] = {
    {65, 1, 66, 66, {1}, {1}},
    {65, 2, 68, 34, {0, 3}, {0, 3}},
    {65, 3, 66, 22, {0, 0, 1}, {0, 0, 1}},
    {3, 1, 4, 4, {1}, {1}},
    {3, 2, 4, 2, {0, 1}, {0, 1}},
    {3, 3, 6, 2, {0, 1, 2}, {0, 0, 3}},
    {3, 4, 8, 2, {0, 1, 2, 2}, {0, 0, 0, 5}},
    // real checkpoints: z1_bf16_dp2, z1_fp32_dp3 (two groups), z2_bf16_dp4
    {1015, 2, 1016, 508, {0, 1}, {0, 1}},
    {940, 3, 942, 314, {0, 0, 2}, {0, 0, 2}},
    {75, 3, 78, 26, {0, 0, 3}, {0, 0, 3}},
    {865, 4, 872, 218, {0, 0, 0, 7}, {0, 0, 0, 7}},
};

TEST(FlatBuffer, SizesAndPaddingsAreThoseOfTheWorkedExamples) {
  for (const FlatRow& row : kFlatRows) {
    SCOPED_TRACE(std::to_string(row.total) + " elements over " + std::to_string(row.dp));
    const FlatSizes sizes = flat_sizes(row.total, row.dp);
    EXPECT_EQ(sizes.flat, row.flat);
    EXPECT_EQ(sizes.partition, row.partition);
    for (int rank = 0; rank < row.dp; ++rank) {
      const auto i = static_cast<size_t>(rank);
      EXPECT_EQ(partition_padding(row.total, sizes.partition, rank), row.paddings[i]) << rank;
      EXPECT_EQ(bf16_partition_padding(row.total, sizes, row.dp, rank), row.bf16_paddings[i])
          << rank;
    }
  }
}

TEST(FlatBuffer, PaddingsSumToWhatIsAddedAndNeverExceedAPartition) {
  for (int dp = 1; dp <= 9; ++dp) {
    for (int64_t total = 0; total <= 200; ++total) {
      const FlatSizes sizes = flat_sizes(total, dp);
      ASSERT_EQ(sizes.flat % (2 * dp), 0);
      ASSERT_LT(sizes.flat - total, 2 * dp);
      int64_t sum = 0;
      for (int rank = 0; rank < dp; ++rank) {
        const int64_t padding = partition_padding(total, sizes.partition, rank);
        ASSERT_GE(padding, 0);
        ASSERT_LE(padding, sizes.partition);
        sum += padding;
      }
      ASSERT_EQ(sum, sizes.flat - total) << total << " over " << dp;
    }
  }
}

TEST(FlatBuffer, AGroupWithoutElementsNeedsNoBuffer) {
  EXPECT_EQ(flat_sizes(0, 4).flat, 0);
  EXPECT_EQ(partition_padding(0, 0, 3), 0);
}

TEST(FlatBuffer, AlignmentPaddingReachesSixteenBytes) {
  const auto bf16 = [](int64_t offset) { return alignment_padding(offset, 2); };
  EXPECT_EQ(bf16(35), 5);
  EXPECT_EQ(bf16(40), 0);
  EXPECT_EQ(bf16(1), 7);
  EXPECT_EQ(alignment_padding(35, 4), 1);
  EXPECT_EQ(alignment_padding(36, 4), 0);
  EXPECT_EQ(alignment_padding(3, 8), 1);
  EXPECT_EQ(alignment_padding(3, 16), 0);
  EXPECT_EQ(alignment_padding(0, 2), 0);
}

TEST(RoundRobin, OrderIsBucketAfterBucket) {
  EXPECT_EQ(round_robin_order(3, 2), (std::vector<int>{0, 2, 1}));
  EXPECT_EQ(round_robin_order(7, 3), (std::vector<int>{0, 3, 6, 1, 4, 2, 5}));
  EXPECT_EQ(round_robin_order(3, 1), (std::vector<int>{0, 1, 2}));
  EXPECT_EQ(round_robin_order(2, 5), (std::vector<int>{0, 1}));
  EXPECT_EQ(round_robin_order(0, 4), (std::vector<int>{}));
}

TEST(Slot, PaddingMayStandOnSeveralLastRanks) {
  EXPECT_EQ(slot_size(3, 3), 1);
  EXPECT_EQ(slot_size(35, 3), 12);
  EXPECT_EQ(slot_used(35, 3, 1), 12);
  EXPECT_EQ(slot_used(35, 3, 2), 11);
  EXPECT_EQ(slot_size(1, 4), 1);
  EXPECT_EQ(slot_used(1, 4, 0), 1);
  for (int rank = 1; rank < 4; ++rank) EXPECT_EQ(slot_used(1, 4, rank), 0);
  EXPECT_EQ(slot_size(0, 4), 0);
}

TEST(Slot, UsedPartsSumToTheTensor) {
  for (int dp = 1; dp <= 9; ++dp) {
    for (int64_t numel = 0; numel <= 100; ++numel) {
      int64_t sum = 0;
      for (int rank = 0; rank < dp; ++rank) sum += slot_used(numel, dp, rank);
      ASSERT_EQ(sum, numel) << dp;
    }
  }
}

TEST(SubGroup, OneIsClosedWhenItReachesTheSize) {
  // M over 3 ranks: slots 12, 5, 5; the running sum is 12, 17, 22.
  EXPECT_EQ(sub_group_counts({35, 15, 15}, 3, 20), (std::vector<int>{3}));
  EXPECT_EQ(sub_group_counts({35, 15, 15}, 3, 17), (std::vector<int>{2, 1}));
  EXPECT_EQ(sub_group_counts({35, 15, 15}, 3, 12), (std::vector<int>{1, 2}));
  EXPECT_EQ(sub_group_counts({35, 15, 15}, 3, 1), (std::vector<int>{1, 1, 1}));
  EXPECT_EQ(sub_group_counts({35, 15, 15}, 3, 22), (std::vector<int>{3}));
  EXPECT_EQ(sub_group_counts({35, 15, 15}, 3, 1'000'000'000), (std::vector<int>{3}));
  EXPECT_EQ(sub_group_counts({3}, 3, 20), (std::vector<int>{1}));
  EXPECT_EQ(sub_group_counts({}, 3, 20), (std::vector<int>{}));
}

// z3_fp32_dp2_subgroups: model M2 over 2 ranks with sub_group_size 200.
TEST(SubGroup, TheFixtureHasSubGroupsOf255And254) {
  const std::vector<int64_t> numels = {1, 130, 10, 10, 170, 17, 170, 10, 10, 170, 17, 170, 130};
  const std::vector<int> counts = sub_group_counts(numels, 2, 200);
  std::vector<int64_t> sizes;
  size_t next = 0;
  for (int count : counts) {
    sizes.push_back(0);
    for (int i = 0; i < count; ++i) sizes.back() += slot_size(numels[next++], 2);
  }
  EXPECT_EQ(next, numels.size());
  EXPECT_EQ(sizes, (std::vector<int64_t>{255, 254}));
}

}  // namespace
}  // namespace isoshard
