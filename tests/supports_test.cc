// What is refused before any work, and what is simulated in memory alone: each with its arithmetic
// and the name of DeepSpeed's error.
#include <gtest/gtest.h>

#include "core/error.h"
#include "properties/file_bridge.h"
#include "reference/model.h"

namespace isoshard {
namespace {

using reference::ModelConfig;
using reference::TrainConfig;

std::string refusal(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    EXPECT_EQ(error.info().code, ErrorCode::kUsage);
    return error.info().what + " | " + error.info().expected + " | " + error.info().found;
  }
  return "";
}

void expect_words(const std::string& text, const std::vector<std::string>& words) {
  for (const std::string& word : words) {
    EXPECT_NE(text.find(word), std::string::npos) << word << " is not in: " << text;
  }
}

TEST(Refused, TopologiesThatNothingDivides) {
  expect_words(refusal([] { check_topology({.data = 2, .sequence = 3, .expert = 4}); }),
               {"AssertionError", "ValueError", "dp·sp·tp = 2·3·1 = 6: 1, 2, 3, 6", "6 mod 4 = 2"});
  expect_words(refusal([] { check_topology({.data = 0}); }), {"ValueError", "1 or more", "0"});
  EXPECT_EQ(refusal([] { check_topology({.data = 2, .sequence = 3, .expert = 6}); }), "");
}

TEST(Refused, ModelsThatATopologyCannotHave) {
  const auto of = [](const ModelConfig& model, const Topology& topology) {
    return refusal([&] { reference::check_model(model, topology); });
  };
  ModelConfig heads, odd, layers, experts, top;
  heads.heads = 5, heads.kv_heads = 2;
  odd.head_size = 3;
  layers.layers = 2;
  experts.experts = 6;
  top.experts = 4, top.top_k = 5;
  expect_words(of(heads, {}), {"ValueError", "5 heads, 2 key-value heads, 5 mod 2 = 1"});
  expect_words(of(odd, {}), {"RuntimeError", "3 mod 2 = 1"});
  expect_words(of(layers, {.pipeline = 3}), {"AssertionError", "pp ≤ 2 layers", "pp = 3"});
  expect_words(of({}, {.data = 2, .expert = 2}), {"ValueError", "ep = 2, 0 experts"});
  expect_words(of(experts, {.data = 4, .expert = 4}), {"ValueError", "6 mod 4 = 2"});
  expect_words(of(top, {}), {"RuntimeError", "top_k ≤ 4", "top_k = 5"});
  EXPECT_EQ(of({}, {.data = 3}), "");
}

std::string why(int stage, const Topology& topology, DType dtype = DType::kFloat32,
                int64_t experts = 0) {
  TrainConfig config;
  config.model.dtype = dtype;
  config.model.heads = config.model.kv_heads = 8;
  config.model.experts = experts;
  return properties::FileBridge::unsupported(config, {topology, stage, 0});
}

TEST(Supports, SaysWhyNot) {
  EXPECT_EQ(why(1, {.data = 2, .sequence = 2}), "");
  EXPECT_EQ(why(2, {.data = 2, .tensor = 2, .expert = 4}, DType::kBFloat16, 4), "");
  expect_words(why(1, {.sequence = 2, .tensor = 2}), {"ValueError", "mutually exclusive"});
  expect_words(why(1, {.tensor = 2}, DType::kFloat32, 4), {"ValueError", "autoep_size > 1"});
  expect_words(why(3, {.tensor = 2, .expert = 2}, DType::kFloat32, 4),
               {"isoshard does not read", "stages 0 and 3"});
  expect_words(why(3, {.sequence = 2}, DType::kFloat32, 4), {"AssertionError", "stage 3"});
  expect_words(why(0, {.data = 2}, DType::kFloat16), {"FP16_Optimizer", "GPUs"});
  expect_words(why(1, {.pipeline = 2}, DType::kFloat32, 4), {"AutoEP", "PipelineModule"});
  expect_words(why(1, {.tensor = 2, .pipeline = 2}), {"model's own code"});
  expect_words(why(1, {.sequence = 2, .pipeline = 2}), {"sequence-parallel"});
  expect_words(why(2, {.pipeline = 2}), {"AssertionError", "incompatible"});
  expect_words(why(0, {.pipeline = 2}, DType::kBFloat16), {"KeyError: 0"});
  expect_words(why(0, {.pipeline = 2}), {"isoshard does not read"});
}

// The one form wants sp that divides the heads, the other as many key-value heads.
TEST(Supports, HeadsThatUlyssesShares) {
  const auto of = [](int64_t heads, int64_t pairs, int ranks) {
    ModelConfig model;
    model.heads = heads;
    model.kv_heads = pairs;
    return reference::sequence_unsupported(model, {.sequence = ranks});
  };
  for (const auto& [heads, pairs, ranks] :
       {std::tuple{4, 2, 2}, {4, 2, 4}, {4, 1, 4}, {8, 2, 4}, {5, 5, 3}, {6, 3, 2}, {7, 7, 5}}) {
    EXPECT_EQ(of(heads, pairs, ranks), "") << heads << " " << pairs << " " << ranks;
  }
  expect_words(of(4, 2, 3),
               {"ValueError: 4 mod 3 = 1 of the heads", "AssertionError: 2 key-value"});
  expect_words(of(12, 4, 6), {"4 mod 6 = 4 and 6 mod 4 = 2 of the key-value heads", "4 key-value"});
}

}  // namespace
}  // namespace isoshard
