// Twenty steps with a change of topology and stage every three, at every number of ranks from 1 to
// 8 and in both modes of the canonical sums: each loss and the last state are the one rank's, bit
// for bit (run_case() says what is compared).
#include <gtest/gtest.h>

#include <iostream>

#include "properties/simulation_case.h"
#include "sim/topologies/catalog.h"

namespace isoshard::properties {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr uint64_t kCases = 1;
#else
constexpr uint64_t kCases = 6;
#endif

// Every leg has so many ranks; a drawn case is one of world ≤ 8.
std::vector<Topology> of_world(int world) {
  std::vector<Topology> list = sim::topologies_up_to(8);
  std::erase_if(list, [&](const Topology& topology) { return topology.world() != world; });
  return list;
}

class TwentySteps : public testing::TestWithParam<reference::ReduceMode> {};

TEST_P(TwentySteps, AreOneRanksAtEveryWorldSize) {
  int64_t changes = 0, files = 0, cases = 0;
  for (int world = 1; world <= 8; ++world) {
    for (uint64_t number = 0; number < kCases; ++number) {
      SimulationCase value =
          seeded_case(static_cast<uint64_t>(world), number, {of_world(world), 20, 3});
      value.config.reduce = GetParam();
      ASSERT_EQ(value.steps(), 20);
      ASSERT_EQ(value.legs.size(), 7u);
      const CaseResult result = run_case(value);
      EXPECT_EQ(result.reason, "") << "world " << world << ", case " << number << "\n"
                                   << text_of(value);
      changes += result.changes;
      files += result.files_changes;
      ++cases;
    }
  }
  std::cout << cases << " runs of 20 steps at 1 to 8 ranks, " << changes
            << " changes of topology or stage, " << files << " by files\n";
  EXPECT_GT(changes, 3 * cases);
}

INSTANTIATE_TEST_SUITE_P(Modes, TwentySteps,
                         testing::Values(reference::ReduceMode::kTree,
                                         reference::ReduceMode::kFixed),
                         [](const auto& info) {
                           return info.param == reference::ReduceMode::kTree ? "Tree" : "Fixed";
                         });

}  // namespace
}  // namespace isoshard::properties
