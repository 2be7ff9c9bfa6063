#include "core/process_group.h"

#include <gtest/gtest.h>

#include "core/error.h"

namespace isoshard {
namespace {

using Ranks = std::vector<int>;

TEST(ProcessGroup, PipelineExampleOfDeepSpeed) {
  const Topology t{.data = 2, .tensor = 2, .pipeline = 2};
  EXPECT_EQ(group_of(t, GroupKind::kPipeline, 1), (Ranks{1, 5}));
  EXPECT_EQ(group_of(t, GroupKind::kData, 5), (Ranks{5, 7}));
  EXPECT_EQ(group_of(t, GroupKind::kTensor, 6), (Ranks{6, 7}));
  EXPECT_EQ(group_of(t, GroupKind::kModel, 4), (Ranks{0, 1, 4, 5}));
  EXPECT_EQ(group_of(t, GroupKind::kModel, 3), (Ranks{2, 3, 6, 7}));
}

TEST(ProcessGroup, ExpertGroupsOfBuildersAAndD) {
  const Topology a{.data = 8, .expert = 2};
  EXPECT_EQ(group_of(a, GroupKind::kExpert, 5), (Ranks{4, 5}));
  EXPECT_EQ(group_of(a, GroupKind::kExpertData, 5), (Ranks{1, 3, 5, 7}));
  const Topology a2{.data = 4, .expert = 2, .pipeline = 2};
  EXPECT_EQ(group_of(a2, GroupKind::kExpertData, 6), (Ranks{4, 6}));
  const Topology d{.data = 4, .tensor = 2, .expert = 4};
  EXPECT_EQ(group_of(d, GroupKind::kTensor, 5), (Ranks{4, 5}));
  EXPECT_EQ(group_of(d, GroupKind::kData, 5), (Ranks{1, 3, 5, 7}));
  EXPECT_EQ(group_of(d, GroupKind::kExpert, 5), (Ranks{4, 5, 6, 7}));
  EXPECT_EQ(group_of(d, GroupKind::kExpertData, 5), (Ranks{1, 5}));
}

TEST(ProcessGroup, UlyssesSharesTheOptimizerOverAllRanks) {
  const Topology t{.data = 2, .sequence = 4};
  EXPECT_EQ(group_of(t, GroupKind::kSequence, 6), (Ranks{4, 5, 6, 7}));
  EXPECT_EQ(group_of(t, GroupKind::kZero, 6), (Ranks{0, 1, 2, 3, 4, 5, 6, 7}));
}

TEST(ProcessGroup, EveryGroupHoldsItsRankAndCoordinatesAreABijection) {
  for (int pp = 1; pp <= 3; ++pp) {
    for (int dp = 1; dp <= 3; ++dp) {
      for (int sp = 1; sp <= 3; ++sp) {
        for (int tp = 1; tp <= 3; ++tp) {
          const Topology t{.data = dp, .sequence = sp, .tensor = tp, .pipeline = pp};
          for (int rank = 0; rank < t.world(); ++rank) {
            ASSERT_EQ(rank_of(t, coordinate_of(t, rank)), rank);
          }
        }
      }
    }
  }
}

TEST(ProcessGroup, ExpertsMustDivideAStage) {
  EXPECT_NO_THROW(check_topology({.data = 2, .sequence = 3, .expert = 6}));
  try {
    check_topology({.data = 2, .sequence = 3, .expert = 4});
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.info().found, "ep = 4, 6 mod 4 = 2");
    EXPECT_NE(error.info().expected.find("1, 2, 3, 6"), std::string::npos);
  }
}

}  // namespace
}  // namespace isoshard
