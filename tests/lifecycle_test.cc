// A run that changes its topology and stage every few steps is the run on one rank.
#include <gtest/gtest.h>

#include "properties/simulation.h"

namespace isoshard::properties {
namespace {

void expect_one_rank(const reference::TrainConfig& config, const std::vector<Leg>& legs,
                     int64_t by_files) {
  Simulation simulation(config, 7);
  int steps = 0;
  for (const Leg& leg : legs) {
    simulation.run(leg);
    steps += leg.steps;
  }
  EXPECT_EQ(difference(single_rank(config, steps), simulation.record()), "");
  EXPECT_EQ(simulation.record().files_legs, by_files);
}

TEST(Lifecycle, DenseThroughFiles) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    reference::TrainConfig config;
    config.model.dtype = dtype;
    config.clip = 1.0;
    config.schedule.kind = reference::ScheduleKind::kWarmup;
    config.model.heads = 6;  // which Ulysses shares among 2 ranks and among 3
    config.model.kv_heads = 3;
    expect_one_rank(config,
                    {{{.data = 2}, 1},
                     {{.data = 3}, 2},
                     {{.data = 2, .sequence = 2}, 3},
                     {{.data = 1}, 0},
                     {{.sequence = 3}, 1},
                     {{.data = 5}, 3},
                     {{.tensor = 2}, 1},
                     {{.data = 2, .tensor = 2}, 3},
                     {{.data = 2, .tensor = 4}, 2},
                     {{.data = 7}, 0}},
                    9);
  }
}

TEST(Lifecycle, FloatSixteenScalesAndSkips) {
  reference::TrainConfig config;
  config.model.dtype = DType::kFloat16;
  config.loss_scale = {.dynamic = true, .scale = 4194304, .window = 2};
  Simulation simulation(config, 3);
  for (const Leg& leg :
       {Leg{{.data = 2}, 1, 2}, Leg{{.data = 3}, 2, 3}, Leg{{.sequence = 2}, 3, 3}})
    simulation.run(leg);
  const Record one = single_rank(config, 8);
  EXPECT_EQ(difference(one, simulation.record()), "");
  EXPECT_TRUE(one.steps[0].skipped);
  EXPECT_FALSE(one.steps[7].skipped);
  EXPECT_EQ(simulation.record().files_legs, 2);
}

TEST(Lifecycle, ExpertsThroughFiles) {
  for (const bool shared : {false, true}) {
    reference::TrainConfig config;
    config.model.experts = 4;
    config.model.shared_expert = shared;
    config.model.dtype = shared ? DType::kFloat32 : DType::kBFloat16;
    config.clip = 1.0;
    config.split_decay = shared;
    expect_one_rank(config,
                    {{{.data = 2, .expert = 2}, 1},
                     {{.data = 4, .expert = 2}, 2},
                     {{.data = 4, .expert = 4}, 3},
                     {{.data = 2}, 0},
                     {{.data = 6, .expert = 2}, 0},
                     {{.data = 2, .sequence = 2, .expert = 4}, 1},
                     {{.data = 3}, 3},
                     {{.data = 4, .expert = 2}, 3}},
                    7);
  }
}

TEST(Lifecycle, ExpertsAndPipelinesInMemory) {
  reference::TrainConfig config;
  config.model.experts = 4;
  config.model.tied = true;
  config.model.dropout = 0.25;
  config.optimizer.kind = reference::OptimizerKind::kLion;
  expect_one_rank(config,
                  {{{.data = 2, .expert = 2}, 1},
                   {{.data = 2, .sequence = 2, .expert = 4}, 3},
                   {{.data = 2, .expert = 2, .pipeline = 2}, 2},
                   {{.tensor = 2}, 0}},
                  0);
}

}  // namespace
}  // namespace isoshard::properties
