// Every topology through DeepSpeed's files, and pairs of them: layout_case.h.
#include <gtest/gtest.h>

#include <algorithm>
#include <iostream>

#include "core/random.h"
#include "properties/check_property.h"
#include "properties/layout_case.h"
#include "sim/topologies/catalog.h"

namespace isoshard::properties {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr uint64_t kPairs = 60, kLargePairs = 3;
constexpr size_t kStride = 8;
#else
constexpr uint64_t kPairs = 2000, kLargePairs = 100;
constexpr size_t kStride = 1;
#endif

std::string checked(const LayoutCase& value, LayoutMutant mutant = LayoutMutant::kNone) {
  try {
    return layout_difference(value, mutant);
  } catch (const std::exception& failure) {
    return failure.what();
  }
}

void check_pairs(int world, uint64_t pairs) {
  const std::vector<Topology> topologies = sim::topologies_up_to(world);
  for (uint64_t number = 0; number < pairs; ++number) {
    const LayoutCase value = seeded_layout_case(5, number, topologies);
    ASSERT_EQ(checked(value), "") << "case " << number << "\n" << text_of(value);
  }
}

TEST(Files, SampledPairsAreLoaded) { check_pairs(8, kPairs); }
TEST(Files, SampledPairsOf64RanksAreLoaded) { check_pairs(64, kLargePairs); }

// What DeepSpeed can run and save, as its own rules say (docs/deepspeed_errata.md, SUPPORT.md), and
// isoshard reads: AutoTP without sp, AutoEP, at stage 3 without sp, folded with AutoTP at stages 1
// and 2, pipelines of stage 1.
bool has_files(const Topology& t, int stage) {
  if (t.pipeline > 1 && t.tensor * t.expert > 1) return false;
  if (t.tensor > 1 && t.expert > 1) return t.sequence == 1 && (stage == 1 || stage == 2);
  if (t.tensor > 1) return t.sequence == 1;
  if (t.expert > 1) return stage < 3 || t.sequence == 1;
  if (t.pipeline > 1) return t.sequence == 1 && stage == 1;
  return true;
}

// How many answers differ from that rule. OtherStage, the mutant: of each stage the next one's.
int wrong_supports(bool other_stage) {
  int questions = 0, wrong = 0;
  reference::TrainConfig dense, experts;
  dense.model.kv_heads = dense.model.heads = 16;  // as many as the largest sp
  experts.model = dense.model;
  experts.model.experts = 8;
  for (const Topology& topology : sim::topologies_up_to(16)) {
    for (const auto& [config, ep] : {std::pair(&dense, false), std::pair(&experts, true)}) {
      if (topology.expert > 1 && !ep) continue;  // there is nothing to share out
      const std::vector<int> found = stages_with_files(*config, topology);
      for (int stage = 0; stage <= 3; ++stage) {
        // A model with experts is AutoEP's also at ep 1.
        Topology as = topology;
        if (ep && as.expert == 1 && as.tensor * as.pipeline > 1) as.expert = 2;
        const bool expected = has_files(as, stage) &&
                              !(ep && stage == 3 && topology.sequence > 1) &&
                              !(ep && topology.expert == 1 && topology.tensor > 1);
        ++questions;
        const int asked = other_stage ? (stage + 1) % 4 : stage;
        if ((std::find(found.begin(), found.end(), asked) != found.end()) == expected) continue;
        ++wrong;
        if (other_stage) continue;
        ADD_FAILURE() << to_string(topology) << " stage " << stage << (ep ? " with experts" : "")
                      << (expected ? " has files" : " has none");
      }
    }
  }
  EXPECT_GT(questions, 1000);
  return wrong;
}

TEST(Files, AreThereForWhatDeepSpeedRuns) { EXPECT_EQ(wrong_supports(false), 0); }
TEST(Files, SupportOfAnotherStageIsAnother) { EXPECT_GT(wrong_supports(true), 100); }

// To any other one, with a model that both can have.
TEST(Files, EveryTopologyIsSavedAndLoaded) {
  const std::vector<Topology> topologies = sim::topologies_up_to(8);
  size_t legs = 0;
  for (size_t i = 0; i < topologies.size(); i += kStride) {
    const Topology& topology = topologies[i];
    for (uint64_t stage = 0; stage < 4; ++stage) {
      if (!has_files(topology, static_cast<int>(stage))) continue;
      Random random(keyed_random(9, {i, stage}));
      const Draw draw = [&](int64_t low, int64_t high) { return random.between(low, high); };
      LayoutCase value;
      bool drawn = false;
      for (int tries = 0; tries < 500 && !drawn; ++tries) {
        value = draw_layout_case(draw, {topology}, topologies);
        drawn = value.from == Leg{topology, static_cast<int>(stage), 0};
      }
      ASSERT_TRUE(drawn) << "no model has files of " << to_string(topology) << " stage " << stage;
      ASSERT_EQ(checked(value), "") << text_of(value);
      ++legs;
    }
  }
  std::cout << legs << " topologies and stages of " << 4 * topologies.size() << "\n";
}

class LayoutMutants : public testing::TestWithParam<LayoutMutant> {};

TEST_P(LayoutMutants, IsKilled) {
  const std::vector<Topology> topologies = sim::topologies_up_to(8);
  expect_killed(0, 100, [&](uint64_t number, bool mutated) {
    return checked(seeded_layout_case(5, number, topologies),
                   mutated ? GetParam() : LayoutMutant::kNone);
  });
}

INSTANTIATE_TEST_SUITE_P(All, LayoutMutants,
                         testing::Values(LayoutMutant::kSwappedRanks, LayoutMutant::kStaleFile,
                                         LayoutMutant::kSwappedLayers),
                         [](const auto& info) { return name(info.param); });

}  // namespace
}  // namespace isoshard::properties
