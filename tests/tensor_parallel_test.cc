// What universal_checkpoint_info says of splits, without a map: the rules of DeepSpeed's converter,
// with the cases of its own tests (tests/unit/checkpoint/test_autotp_uc_checkpoint.py; the table is
// docs/deepspeed_tests.md).
#include "checkpoint/deepspeed/tensor_parallel.h"

#include <gtest/gtest.h>

#include "checkpoint/memory_storage.h"
#include "checkpoint/torch_builder.h"
#include "core/error.h"
#include "reshard/executor.h"

namespace isoshard::checkpoint {
namespace {

using Shards = std::vector<std::optional<Shape>>;

// A model file that holds nothing but universal_checkpoint_info.
class Info {
 public:
  TorchBuilder builder;
  std::vector<std::pair<std::string, NodeId>> entries;

  NodeId integers(const std::vector<int64_t>& values, bool tuple = false) {
    std::vector<NodeId> items;
    for (int64_t value : values) items.push_back(builder.pickle.integer(value));
    return tuple ? builder.pickle.tuple(std::move(items)) : builder.pickle.list(std::move(items));
  }
  void version(double value) {
    entries.emplace_back("universal_checkpoint_version", builder.pickle.real(value));
  }
  void list(const char* key, const std::string& pattern) {
    entries.emplace_back(key, builder.pickle.list({builder.pickle.string(pattern)}));
  }
  // One sub-parameter entry for "qkv"; widths may be empty.
  void sub_params(std::vector<NodeId> shape, const Widths& widths) {
    Pickle& pickle = builder.pickle;
    const NodeId entry = builder.dict({{"patterns", pickle.list({pickle.string("^qkv$")})},
                                       {"shape", pickle.list(std::move(shape))},
                                       {"partition_dim", pickle.integer(0)}});
    entries.emplace_back("parameter_with_sub_params", pickle.list({entry}));
    if (widths.empty()) return;
    std::vector<NodeId> lists;
    for (const std::vector<int64_t>& sub : widths) lists.push_back(integers(sub));
    entries.emplace_back("sub_param_shard_widths",
                         builder.dict({{"^qkv$", pickle.list(std::move(lists))}}));
  }

  TensorSplit split(const std::string& name, const Shards& shards) {
    const NodeId info = builder.dict(entries);
    std::vector<FileBlueprint> files;
    files.push_back(builder.finish("info.pt", builder.dict({{"universal_checkpoint_info", info}})));
    const ShardedState nothing;
    storage_.make_directories("/d");
    reshard::execute(storage_, nothing, reshard::make_plan(nothing, std::move(files)), "/d",
                     {.workers = 1});
    file_ = std::make_shared<TorchFile>(storage_, "/d/info.pt");
    const Fields fields(*file_);
    const TensorParallelInfo read(fields, 0,
                                  fields.need(fields.root(), "universal_checkpoint_info"));
    return read.split_of(name, shards);
  }

 private:
  MemoryStorage storage_;
  std::shared_ptr<TorchFile> file_;
};

std::string message(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

// Elements of the whole, by rank.
std::vector<std::vector<int64_t>> held(const TensorSplit& split) {
  std::vector<std::vector<int64_t>> result;
  for (const RankMap& rank : split.map.ranks) {
    result.emplace_back();
    for (const MapRun& run : shard_runs(rank)) {
      for (int64_t i = 0; i < run.count; ++i) result.back().push_back(run.source + i);
    }
  }
  return result;
}

using Held = std::vector<std::vector<int64_t>>;

// merge_restores_uneven_fused_bias_order
TEST(TensorParallel, UnevenFusedBias) {
  Info info;
  info.version(0.4);
  info.sub_params({info.integers({6, 3, 3}, true)}, {{4, 2}, {2, 1}, {2, 1}});
  const TensorSplit split = info.split("qkv", {Shape{8}, Shape{4}});
  EXPECT_EQ(held(split), (Held{{0, 1, 2, 3, 6, 7, 9, 10}, {4, 5, 8, 11}}));
  EXPECT_EQ(converted_shape(split), (Shape{12}));
}

// merge_handles_rank_without_any_sub_param_rows
TEST(TensorParallel, ARankWithoutRowsOfAFusedTensor) {
  Info info;
  info.version(0.4);
  info.sub_params({info.integers({2, 1, 1}, true), info.builder.pickle.integer(-1)},
                  {{2, 0}, {1, 0}, {1, 0}});
  const TensorSplit split = info.split("qkv", {Shape{4, 2}, std::nullopt});
  EXPECT_EQ(converted_shape(split), (Shape{4, 2}));
  EXPECT_EQ(held(split)[0].size(), 8u);
}

// merge_realigns_rank_that_wrote_no_fragment
TEST(TensorParallel, ARankInTheMiddleHoldsNothing) {
  Info info;
  info.version(0.4);
  info.sub_params({info.integers({4, 2, 2}, true)}, {{2, 0, 2}, {1, 0, 1}, {1, 0, 1}});
  const TensorSplit split = info.split("qkv", {Shape{4}, std::nullopt, Shape{4}});
  EXPECT_EQ(held(split), (Held{{0, 1, 4, 6}, {}, {2, 3, 5, 7}}));
}

// merge_rejects_current_version_without_shard_widths
TEST(TensorParallel, Version04NeedsWidths) {
  Info info;
  info.version(0.4);
  info.sub_params({info.integers({2, 2, 2}, true)}, {});
  const std::string told = message([&] { info.split("qkv", {Shape{3}, Shape{3}}); });
  EXPECT_NE(told.find("widths of a fused parameter are not recorded"), std::string::npos) << told;
}

// merge_decodes_legacy_subparam_count
TEST(TensorParallel, AnOlderCountMeansEqualWidths) {
  Info info;
  info.version(0.3);
  info.sub_params({info.builder.pickle.integer(3), info.builder.pickle.integer(-1)}, {});
  const TensorSplit split = info.split("qkv", {Shape{6, 2}, Shape{6, 2}});
  EXPECT_EQ(split.widths, (Widths{{2, 2}, {2, 2}, {2, 2}}));
  EXPECT_TRUE(split.from_count);
  EXPECT_EQ(converted_shape(split), (Shape{12, 2}));
}

// resolve_rejects_uneven_subparams_without_widths
TEST(TensorParallel, AnOlderCountMustDivide) {
  Info info;
  info.version(0.3);
  info.sub_params({info.builder.pickle.integer(5), info.builder.pickle.integer(-1)}, {});
  const std::string told = message([&] { info.split("qkv", {Shape{6, 2}, Shape{6, 2}}); });
  EXPECT_NE(told.find("does not divide"), std::string::npos) << told;
}

// merge_uses_row_parallel_cat_dim
TEST(TensorParallel, RowsAreJoinedAlongAxisOne) {
  Info info;
  info.list("parameter_with_row_parallelism_patterns", "^o$");
  const TensorSplit split = info.split("o", {Shape{4, 3}, Shape{4, 2}});
  EXPECT_EQ(split.kind, SplitKind::kRow);
  EXPECT_EQ(converted_shape(split), (Shape{4, 5}));
  EXPECT_EQ(held(split)[1], (std::vector<int64_t>{3, 4, 8, 9, 13, 14, 18, 19}));
}

// The worked merge of two sub-parameters: a0 a1 b0 b1 a2 a3 b2 b3.
TEST(TensorParallel, TwoSubParametersAreHalvesOfEachShard) {
  Info info;
  info.list("parameter_with_2_sub_params_cat_dim_0", "kv");
  const TensorSplit split = info.split("kv.weight", {Shape{4}, Shape{4}});
  EXPECT_EQ(held(split), (Held{{0, 1, 4, 5}, {2, 3, 6, 7}}));
}

TEST(TensorParallel, VocabularyPaddingIsCut) {
  Info info;
  info.list("vocabulary_parameter_patterns", "^e$");
  info.entries.emplace_back("original_vocab_size", info.builder.pickle.integer(10));
  const TensorSplit split = info.split("e", {Shape{6, 4}, Shape{6, 4}});
  EXPECT_EQ(converted_shape(split), (Shape{10, 4}));
  Info bare;
  bare.list("vocabulary_parameter_patterns", "^e$");
  EXPECT_NE(message([&] { bare.split("e", {Shape{6, 4}}); }).find("KeyError"), std::string::npos);
}

// validate_autotp_conversion_support_rejects_unsupported_layout
TEST(TensorParallel, UnsupportedLayoutsSayTheirReason) {
  Info info;
  info.entries.emplace_back(
      "autotp_unsupported_parameter_patterns",
      info.builder.dict({{"^c_attn$", info.builder.pickle.string("kv is shared")}}));
  const std::string told = message([&] { info.split("c_attn", {Shape{6, 4}, Shape{6, 4}}); });
  EXPECT_NE(told.find("kv is shared"), std::string::npos) << told;
}

TEST(TensorParallel, ShardsOfOtherShapesAreRefused) {
  Info info;
  info.list("tp_replicated_parameter_patterns", "^norm$");
  EXPECT_NE(message([&] {
              info.split("norm", {Shape{4}, Shape{5}});
            }).find("[5]"),
            std::string::npos);
  Info other;
  const std::string told = message([&] { other.split("w", {Shape{4, 2}, Shape{4, 3}}); });
  EXPECT_NE(told.find("[4, 3]"), std::string::npos) << told;
}

TEST(TensorParallel, OneListNamesAParameterOnce) {
  Info info;
  Pickle& pickle = info.builder.pickle;
  info.entries.emplace_back("tp_replicated_parameter_patterns",
                            pickle.list({pickle.string("^norm$"), pickle.string("no.*")}));
  const std::string told = message([&] { info.split("norm", {Shape{4}, Shape{4}}); });
  EXPECT_NE(told.find("Two patterns"), std::string::npos) << told;
}

TEST(Patterns, AreAnchoredAtTheStartOnly) {
  PatternList list;
  list.add("layers\\.\\d+", "f");
  list.add(exact_pattern("a+b.c"), "f");
  EXPECT_EQ(exact_pattern("a+b.c"), "^a\\+b\\.c$");
  EXPECT_EQ(list.matching("layers.12.weight"), (std::vector<int>{0}));
  EXPECT_EQ(list.first("x.layers.1"), -1);
  EXPECT_EQ(list.first("a+b.c"), 1);
  EXPECT_EQ(list.first("a+b.c.d"), -1);
  EXPECT_NE(message([&] { list.add("(?=x)", "f"); }).find("cannot be understood"),
            std::string::npos);
}

}  // namespace
}  // namespace isoshard::checkpoint
