// Facts about locate() and fragments(): the worked examples, then the law that joins the two.
#include "core/layout.h"

#include <gtest/gtest.h>

#include "core/check.h"
#include "core/zero_rules.h"

namespace isoshard {
namespace {

using Fragments = std::vector<RankFragment>;

TEST(Layout, ReplicatedTensorIsOneRunOnRankZero) {
  const TensorLayout layout{.numel = 15, .ranks = 4, .placement = Replicated{35}};
  EXPECT_EQ(fragments(layout), (Fragments{{0, 0, 15, 35}}));
  EXPECT_EQ(locate(layout, 14), (Location{0, 49}));
}

// Group 0 of model M over 3 ranks: emb 35, l1 15, l2 15, partitions of 22.
TEST(Layout, FlatShardsAreCutAtPartitionEnds) {
  const TensorLayout emb{.numel = 35, .ranks = 3, .placement = FlatShard{0, 22}};
  const TensorLayout l1{.numel = 15, .ranks = 3, .placement = FlatShard{35, 22}};
  const TensorLayout l2{.numel = 15, .ranks = 3, .placement = FlatShard{50, 22}};
  EXPECT_EQ(fragments(emb), (Fragments{{0, 0, 22, 0}, {1, 22, 13, 0}}));
  EXPECT_EQ(fragments(l1), (Fragments{{1, 0, 9, 13}, {2, 9, 6, 0}}));
  EXPECT_EQ(fragments(l2), (Fragments{{2, 0, 15, 6}}));
}

TEST(Layout, SlotShardsBeginAtTheSameOffsetOnEveryRank) {
  // 35 elements over 3 ranks: slots of 12, the last one holds 11.
  const TensorLayout emb{.numel = 35, .ranks = 3, .placement = SlotShard{100, 12}};
  EXPECT_EQ(fragments(emb), (Fragments{{0, 0, 12, 100}, {1, 12, 12, 100}, {2, 24, 11, 100}}));
  const TensorLayout one{.numel = 1, .ranks = 4, .placement = SlotShard{7, 1}};
  EXPECT_EQ(fragments(one), (Fragments{{0, 0, 1, 7}}));
}

TEST(Layout, ATensorWithoutElementsHasNoFragments) {
  EXPECT_TRUE(fragments({.numel = 0, .ranks = 2, .placement = Replicated{3}}).empty());
  EXPECT_TRUE(fragments({.numel = 0, .ranks = 2, .placement = FlatShard{3, 4}}).empty());
  EXPECT_TRUE(fragments({.numel = 0, .ranks = 2, .placement = SlotShard{3, 1}}).empty());
}

TEST(Layout, AnElementOutsideTheTensorIsOurBug) {
  const TensorLayout layout{.numel = 3, .ranks = 1, .placement = FlatShard{0, 4}};
  EXPECT_THROW(locate(layout, -1), CheckFailure);
  EXPECT_THROW(locate(layout, 3), CheckFailure);
}

TEST(Layout, TooFewRanksForTheTensorIsOurBug) {
  EXPECT_THROW(fragments({.numel = 9, .ranks = 2, .placement = FlatShard{0, 4}}), CheckFailure);
  EXPECT_THROW(fragments({.numel = 9, .ranks = 2, .placement = SlotShard{0, 4}}), CheckFailure);
}

// Fragments are in order, whole, as few as can be, and each element of one is where locate() says.
void expect_agreement(const TensorLayout& layout) {
  int64_t next = 0;
  const Fragments list = fragments(layout);
  for (size_t i = 0; i < list.size(); ++i) {
    const RankFragment& f = list[i];
    ASSERT_EQ(f.begin, next);
    ASSERT_GT(f.count, 0);
    for (int64_t k = 0; k < f.count; ++k) {
      ASSERT_EQ(locate(layout, f.begin + k), (Location{f.rank, f.offset_local + k}));
    }
    if (i > 0) {
      const RankFragment& before = list[i - 1];
      const bool joins =
          before.rank == f.rank && before.offset_local + before.count == f.offset_local;
      ASSERT_FALSE(joins) << "two runs that are one";
    }
    next += f.count;
  }
  ASSERT_EQ(next, layout.numel);
}

// What a rank is told of its own part is what the whole list says of it. A replicated tensor is on
// every rank, whole.
void expect_own_parts(const TensorLayout& layout) {
  Fragments expected(static_cast<size_t>(layout.ranks));
  for (const RankFragment& f : fragments(layout)) expected[static_cast<size_t>(f.rank)] = f;
  for (int rank = 0; rank < layout.ranks; ++rank) {
    RankFragment own = expected[static_cast<size_t>(rank)];
    own.rank = rank;
    ASSERT_EQ(fragment_on(layout, rank), own) << rank;
  }
}

TEST(Layout, FragmentsAgreeWithLocateForEverySmallCase) {
  for (int ranks = 1; ranks <= 5; ++ranks) {
    for (int64_t numel = 0; numel <= 23; ++numel) {
      expect_agreement({numel, ranks, SlotShard{3, std::max<int64_t>(1, slot_size(numel, ranks))}});
      expect_agreement({numel, ranks, Replicated{5}});
      for (int64_t before = 0; before <= 11; ++before) {
        const FlatSizes sizes = flat_sizes(before + numel, ranks);
        if (sizes.partition > 0)
          expect_agreement({numel, ranks, FlatShard{before, sizes.partition}});
      }
    }
  }
}

TEST(Layout, ARanksOwnPartIsThatOfTheWholeList) {
  for (int ranks = 1; ranks <= 5; ++ranks) {
    for (int64_t numel = 0; numel <= 23; ++numel) {
      expect_own_parts({numel, ranks, SlotShard{3, std::max<int64_t>(1, slot_size(numel, ranks))}});
      for (int64_t before = 0; before <= 11; ++before) {
        const FlatSizes sizes = flat_sizes(before + numel, ranks);
        if (sizes.partition > 0)
          expect_own_parts({numel, ranks, FlatShard{before, sizes.partition}});
      }
    }
  }
  const TensorLayout everywhere{.numel = 9, .ranks = 3, .placement = Replicated{4}};
  EXPECT_EQ(fragment_on(everywhere, 2), (RankFragment{2, 0, 9, 4}));
}

TEST(Layout, OffsetsBeyondFourBillionElementsAreExact) {
  const int64_t partition = int64_t{1} << 40;
  const TensorLayout layout{
      .numel = 4, .ranks = 3, .placement = FlatShard{2 * partition - 2, partition}};
  EXPECT_EQ(fragments(layout), (Fragments{{1, 0, 2, partition - 2}, {2, 2, 2, 0}}));
}

}  // namespace
}  // namespace isoshard
