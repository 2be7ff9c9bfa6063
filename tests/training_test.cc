// The journey's promise, at its simplest: a few steps on a topology are those of one rank.
#include <gtest/gtest.h>

#include "core/error.h"
#include "properties/simulation.h"
#include "reference/trainer.h"
#include "reference/whole_state.h"
#include "sim/cluster.h"

namespace isoshard {
namespace {

using reference::StepReport;
using reference::TrainConfig;
using reference::Trainer;
using reference::WholeState;

struct Trained {
  std::vector<StepReport> reports;
  WholeState state;
  size_t events = 0;
};

Trained train(const TrainConfig& config, const Topology& topology, int steps, uint64_t seed = 1) {
  sim::Cluster cluster(topology, {.seed = seed});
  std::vector<std::unique_ptr<Trainer>> trainers(static_cast<size_t>(topology.world()));
  Trained run;
  cluster.run([&](sim::Rank& rank) {
    auto& trainer = trainers[static_cast<size_t>(rank.number())];
    trainer = std::make_unique<Trainer>(config, properties::parallel_state(rank));
    trainer->initialise();
    for (int i = 0; i < steps; ++i) {
      const StepReport report = trainer->step();
      if (rank.number() == 0) run.reports.push_back(report);
    }
  });
  std::vector<const TrainingState*> states;
  for (const auto& trainer : trainers) states.push_back(&trainer->state());
  run.state = reference::whole_state(states);
  run.events = cluster.trace().events().size();
  return run;
}

void expect_same(const TrainConfig& config, const Trained& one, const Topology& topology,
                 int stage) {
  TrainConfig staged = config;
  staged.stage = stage;
  const Trained run = train(staged, topology, static_cast<int>(one.reports.size()), 99);
  const std::string where = to_string(topology) + " stage " + std::to_string(stage);
  for (size_t i = 0; i < one.reports.size(); ++i) {
    EXPECT_EQ(run.reports[i].loss, one.reports[i].loss) << where << " step " << i;
    EXPECT_EQ(run.reports[i].norm, one.reports[i].norm) << where << " step " << i;
  }
  EXPECT_EQ(reference::difference(one.state, run.state), "") << where;
}

TEST(Training, OneRankSendsNothing) {
  TrainConfig config;
  config.data.masked = 0;
  config.schedule.max_lr = 0.02;
  const Trained run = train(config, {}, 3);
  EXPECT_EQ(run.events, 0u);
  for (const StepReport& report : run.reports) {
    EXPECT_GT(report.loss, 1.0f);
    EXPECT_LT(report.loss, 5.0f);
    EXPECT_EQ(report.tokens, 28);
  }
}

TEST(Training, DenseTopologiesAreOneRank) {
  TrainConfig config;
  config.clip = 0.5;
  const Trained one = train(config, {}, 3);
  for (int stage = 0; stage <= 3; ++stage) {
    expect_same(config, one, {.data = 2}, stage);
    expect_same(config, one, {.data = 3}, stage);
    expect_same(config, one, {.sequence = 2}, stage);
    expect_same(config, one, {.sequence = 3}, stage);
    expect_same(config, one, {.tensor = 2}, stage);
    expect_same(config, one, {.tensor = 4}, stage);
    expect_same(config, one, {.data = 2, .sequence = 2, .tensor = 2}, stage);
    expect_same(config, one, {.data = 2, .pipeline = 2}, stage);
    expect_same(config, one, {.data = 5, .sequence = 1, .tensor = 3}, stage);
    expect_same(config, one, {.sequence = 7}, stage);
  }
}

TEST(Training, ExpertTopologiesAreOneRank) {
  TrainConfig config;
  config.model.experts = 4;
  config.model.shared_expert = true;
  config.model.tied = true;
  config.model.dtype = DType::kBFloat16;
  config.data.packed = true;
  const Trained one = train(config, {}, 3);
  for (int stage = 0; stage <= 3; ++stage) {
    expect_same(config, one, {.data = 2, .expert = 2}, stage);
    expect_same(config, one, {.data = 4, .expert = 2}, stage);
    expect_same(config, one, {.data = 2, .sequence = 2, .expert = 4}, stage);
    expect_same(config, one, {.data = 2, .tensor = 2, .expert = 4}, stage);
    expect_same(config, one, {.data = 3, .tensor = 2, .expert = 2}, stage);
    expect_same(config, one, {.data = 2, .expert = 2, .pipeline = 2}, stage);
  }
}

}  // namespace
}  // namespace isoshard
