// Every recorded answer of DeepSpeed's own functions (scripts/record_parts.py).
#include "core/pipeline_rules.h"

#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

namespace isoshard {
namespace {

TEST(PipelineRules, AreDeepSpeedsOwn) {
  std::ifstream file(ISOSHARD_TRACES "/rules/pipeline_parts.json");
  const nlohmann::json cases = nlohmann::json::parse(file).at("cases");
  ASSERT_GT(cases.size(), 160u);
  for (const nlohmann::json& each : cases) {
    const auto weights = each.at("weights").get<std::vector<int64_t>>();
    const int stages = each.at("stages").get<int>();
    EXPECT_EQ(uniform_parts(static_cast<int>(weights.size()), stages),
              each.at("uniform").get<std::vector<int>>())
        << each;
    EXPECT_EQ(balanced_parts(weights, stages), each.at("balanced").get<std::vector<int>>()) << each;
  }
}

TEST(PipelineRules, TheFirstStagesTakeTheRemainder) {
  EXPECT_EQ(uniform_parts(7, 3), (std::vector<int>{0, 3, 5, 7}));
  EXPECT_EQ(uniform_parts(2, 4), (std::vector<int>{0, 1, 2, 2, 2}));
}

}  // namespace
}  // namespace isoshard
