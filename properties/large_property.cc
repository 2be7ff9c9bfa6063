// Training on many ranks: topologies of up to 64 ranks sampled, and single steps of 1,024.
#include <gtest/gtest.h>

#include <algorithm>

#include "core/check.h"
#include "core/random.h"
#include "properties/simulation_case.h"
#include "sim/topologies/catalog.h"

namespace isoshard::properties {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr uint64_t kCases = 4;
constexpr int kShare = 16;  // of the 1,024 ranks
#else
constexpr uint64_t kCases = 40;
constexpr int kShare = 1;
#endif

// Lives of 6 steps with two changes of topology and stage.
TEST(Large, SampledTopologiesOf64RanksAreOneRank) {
  const std::vector<Topology> all = sim::topologies_up_to(64);
  for (uint64_t number = 0; number < kCases; ++number) {
    std::vector<Topology> some;
    for (uint64_t k = 0; k < 40; ++k)
      some.push_back(all[keyed_random(7, {number, k}) % all.size()]);
    const SimulationCase value = seeded_case(7, number, {some, 6, 2});
    EXPECT_EQ(run_case(value).reason, "") << "case " << number << "\n" << text_of(value);
  }
}

struct LargeStep {
  Topology topology;
  int stage = 0;
  int64_t experts = 0;
};

void PrintTo(const LargeStep& step, std::ostream* out) { *out << to_string(step.topology); }

class LargeSteps : public testing::TestWithParam<LargeStep> {};

// What is wrong with that step. NarrowWorld, the mutant: loss and norm are summed over the ranks
// that share optimizer states alone, not over those of other shards and stages.
std::string step_difference(LargeStep step, bool narrow_world) {
  step.topology.data = std::max(1, step.topology.data / kShare);
  reference::TrainConfig config;
  config.model.heads = 8;
  config.model.kv_heads = 4;
  config.model.layers = 4;
  config.model.experts = step.experts;
  config.model.shared_expert = step.experts > 0;
  config.data.batch = step.topology.data;
  config.clip = 0.1;
  config.split_decay = true;
  const Record expected = single_rank(config, 1);
  config.stage = step.stage;
  Record found;
  sim::Cluster cluster(step.topology, {.seed = 5, .stack_bytes = 128 * 1024});
  std::vector<TrainingState> states(static_cast<size_t>(step.topology.world()));
  reference::LayoutCache layouts;
  cluster.run([&](sim::Rank& rank) {
    ParallelState parallel = parallel_state(rank);
    if (narrow_world) parallel.world = parallel.zero;
    reference::Trainer trainer(config, parallel, &layouts);
    trainer.initialise();
    const reference::StepReport report = trainer.step();
    if (rank.number() == 0) found.steps.push_back(report);
    states[static_cast<size_t>(rank.number())] = std::move(trainer.state());
  });
  found.state = reference::whole_state_of(states);
  return difference(expected, found);
}

TEST_P(LargeSteps, IsTheStepOfOneRank) { EXPECT_EQ(step_difference(GetParam(), false), ""); }

TEST(LargeMutants, NarrowWorldIsKilled) {
  const LargeStep step{{.data = 32, .sequence = 2, .tensor = 2, .pipeline = 2}, 1};
  EXPECT_EQ(step_difference(step, false), "");
  std::string reason;
  try {
    reason = step_difference(step, true);
  } catch (const CheckFailure& failure) {  // ranks hold other bits of the same element
    reason = failure.what();
  }
  EXPECT_NE(reason, "");
}

INSTANTIATE_TEST_SUITE_P(
    Large, LargeSteps,
    testing::Values(LargeStep{{.data = 1024}, 1}, LargeStep{{.data = 512, .sequence = 2}, 3},
                    LargeStep{{.data = 64, .sequence = 4, .tensor = 4}, 2},
                    LargeStep{{.data = 64, .sequence = 2, .tensor = 2, .pipeline = 4}, 1},
                    LargeStep{{.data = 128, .tensor = 2, .expert = 8, .pipeline = 4}, 0, 8}));

}  // namespace
}  // namespace isoshard::properties
