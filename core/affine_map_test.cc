// Maps as DeepSpeed writes them, and maps that cannot be.
#include "core/affine_map.h"

#include <gtest/gtest.h>

namespace isoshard {
namespace {

// o_proj [32, 32] on 2 ranks, as a real checkpoint has it.
TEST(AffineMap, ARowSplitIsOneStridedPieceARank) {
  const AffineMap map = split_map({32, 32}, 1, {{16, 16}});
  const MapPiece expected{{32, 16}, 16, {32, 1}, 0, {16, 1}, {1}};
  EXPECT_EQ(map.ranks[1].shard_shape, (Shape{32, 16}));
  ASSERT_EQ(map.ranks[1].pieces.size(), 1u);
  EXPECT_EQ(map.ranks[1].pieces[0], expected);
  EXPECT_EQ(piece_runs(expected).size(), 32u);
  EXPECT_EQ(piece_runs(expected)[2], (MapRun{80, 32, 16}));
  EXPECT_EQ(why_impossible(map), "");
}

// qkv [32, 16] of a real checkpoint: query, key and value rows of one matrix.
TEST(AffineMap, SubParametersAreCutOneByOne) {
  const AffineMap map = split_map({32, 16}, 0, {{8, 8}, {4, 4}, {4, 4}});
  EXPECT_EQ(map.ranks[1].pieces[1], (MapPiece{{4, 16}, 320, {16, 1}, 128, {16, 1}, {1}}));
  EXPECT_EQ(shard_runs(map.ranks[1]),
            (std::vector<MapRun>{{128, 0, 128}, {320, 128, 64}, {448, 192, 64}}));
  EXPECT_EQ(why_impossible(map), "");
}

// Touching in the whole is not enough.
TEST(AffineMap, RunsAreJoinedOnlyWhereTheyTouchOnBothSides) {
  const RankMap rank{
      {6}, {{{2}, 0, {1}, 0, {1}, {0}}, {{2}, 2, {1}, 4, {1}, {0}}, {{2}, 8, {1}, 2, {1}, {0}}}};
  EXPECT_EQ(shard_runs(rank), (std::vector<MapRun>{{0, 0, 2}, {8, 2, 2}, {2, 4, 2}}));
  const RankMap apart{{5}, {{{2}, 0, {1}, 0, {1}, {0}}, {{2}, 2, {1}, 3, {1}, {0}}}};
  EXPECT_EQ(shard_runs(apart), (std::vector<MapRun>{{0, 0, 2}, {2, 3, 2}}));
}

TEST(AffineMap, ARankMayHoldNothing) {
  const AffineMap map = split_map({16, 32}, 0, {{8, 8, 0}});
  EXPECT_EQ(map.ranks[2].shard_shape, (Shape{0, 32}));
  EXPECT_EQ(map.ranks[2].pieces[0].source_offset, 512);
  EXPECT_TRUE(shard_runs(map.ranks[2]).empty());
  // o_proj of autotp_tp2_to_tp4_dp1: the stride of an empty row shard is 0.
  EXPECT_EQ(split_map({32, 32}, 1, {{16, 16, 0, 0}}).ranks[3].pieces[0],
            (MapPiece{{32, 0}, 32, {32, 1}, 0, {0, 1}, {3}}));
  EXPECT_EQ(why_impossible(map), "");
}

TEST(AffineMap, ReplicasCountOnce) {
  const AffineMap map = replicated_map({3, 2}, 4);
  EXPECT_TRUE(is_replicated(map));
  EXPECT_EQ(why_impossible(map), "");
  EXPECT_FALSE(is_replicated(split_map({4}, 0, {{2, 2}})));
}

TEST(AffineMap, TheImpossibleIsNamed) {
  AffineMap hole = split_map({10, 4}, 0, {{5, 5}});
  hole.ranks[1].pieces[0].source_offset = 16;
  EXPECT_NE(why_impossible(hole).find("hole in the whole"), std::string::npos);
  AffineMap outside = split_map({10, 4}, 0, {{5, 5}});
  outside.ranks[1].pieces[0].source_offset = 24;
  EXPECT_NE(why_impossible(outside).find("leaves its tensor"), std::string::npos);
  AffineMap repeated = split_map({10, 4}, 0, {{5, 5}});
  repeated.ranks[0].pieces[0].dest_stride = {0, 1};
  EXPECT_NE(why_impossible(repeated).find("hole or overlap"), std::string::npos);
  AffineMap endless = split_map({10, 4}, 0, {{5, 5}});
  endless.ranks[0].pieces[0].shape = {1'000'000'000, 1'000'000'000};
  endless.ranks[0].pieces[0].dest_stride = {0, 0};
  EXPECT_NE(why_impossible(endless), "");
  AffineMap absent = split_map({10, 4}, 0, {{5, 5}});
  absent.ranks[0].pieces[0].locations = {1};
  EXPECT_NE(why_impossible(absent).find("name the ranks"), std::string::npos);
}

}  // namespace
}  // namespace isoshard
