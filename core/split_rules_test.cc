// The table of the specification: widths that DeepSpeed itself gives.
#include "core/split_rules.h"

#include <gtest/gtest.h>

namespace isoshard {
namespace {

using W = std::vector<int64_t>;

W cut(int64_t kv, int64_t grain, int64_t total, int ranks, const char* layer) {
  return split_widths({.kv_heads = kv, .grain = grain}, total, ranks, layer);
}

TEST(SplitRules, TheFirstRanksTakeTheRemainder) {
  EXPECT_EQ(cut(0, 1, 101, 2, "lm_head"), (W{51, 50}));
  EXPECT_EQ(cut(0, 1, 10, 4, "x"), (W{3, 3, 2, 2}));
  EXPECT_EQ(cut(0, 1, 10, 3, "lm_head"), (W{4, 3, 3}));
  EXPECT_EQ(cut(0, 1, 3, 4, "x"), (W{1, 1, 1, 0}));
  EXPECT_EQ(cut(3, 1, 10, 2, "None"), (W{5, 5}));
}

TEST(SplitRules, HeadsStayWhole) {
  EXPECT_EQ(cut(6, 1, 384, 4, "model.layers.0.self_attn.q_proj"), (W{128, 128, 64, 64}));
  EXPECT_EQ(cut(4, 1, 12, 3, "model.layers.0.self_attn.q_proj"), (W{6, 3, 3}));
  EXPECT_EQ(cut(2, 1, 16, 4, "model.layers.0.self_attn.q_proj"), (W{8, 8, 0, 0}));
  EXPECT_EQ(cut(1, 1, 64, 2, "a.q_proj"), (W{64, 0}));
  EXPECT_EQ(cut(4, 1, 12, 16, "None"), (W{3, 3, 3, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}));
}

TEST(SplitRules, LayersWithoutHeadsAreCutEvenly) {
  for (const char* layer : {"a.mlp.down_proj", "mlp.fc1", "lm_head", "b.w1x"})
    EXPECT_EQ(cut(2, 1, 64, 4, layer), (W{16, 16, 16, 16})) << layer;
  EXPECT_EQ(cut(2, 1, 64, 4, "model.lm_head"), (W{32, 32, 0, 0}));
}

TEST(SplitRules, TheGrainLeavesOneUnalignedRank) {
  EXPECT_EQ(cut(0, 64, 50257, 2, "lm_head"), (W{25152, 25105}));
  EXPECT_EQ(cut(0, 64, 151936, 8, "lm_head"),
            (W{19008, 19008, 19008, 19008, 19008, 19008, 18944, 18944}));
  EXPECT_EQ(cut(0, 64, 32000, 4, "lm_head"), (W{8000, 8000, 8000, 8000}));
  EXPECT_EQ(cut(0, 64, 50257, 8, "lm_head"), (W{6336, 6272, 6272, 6272, 6272, 6272, 6272, 6289}));
  EXPECT_EQ(cut(0, 64, 100, 4, "x"), (W{64, 0, 0, 36}));
  EXPECT_EQ(cut(0, 64, 50, 4, "x"), (W{13, 13, 12, 12}));
  EXPECT_EQ(cut(0, 4, 10, 2, "x"), (W{4, 6}));
}

TEST(SplitRules, CeilIsAnotherConvention) {
  EXPECT_EQ(ceil_widths(10, 4), (W{3, 3, 3, 1}));
  EXPECT_EQ(ceil_widths(9, 4), (W{3, 3, 3, 0}));
  EXPECT_EQ(ceil_widths(8, 4), cut(0, 1, 8, 4, "x"));
}

}  // namespace
}  // namespace isoshard
