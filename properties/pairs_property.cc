// Every pair of (dp, sp, stage) with dp·sp up to 8: plans exhaustively, files each once and
// sampled.
#include <gtest/gtest.h>

#include <algorithm>
#include <iostream>
#include <sstream>

#include "core/random.h"
#include "properties/check_property.h"
#include "properties/expect.h"
#include "properties/workshop.h"
#include "reshard/plan.h"

namespace isoshard::properties {
namespace {

using checkpoint::ShardedState;

std::vector<Job> all_jobs() {
  std::vector<Job> jobs;
  for (int ranks = 1; ranks <= 8; ++ranks) {
    for (int sequence = 1; sequence <= ranks; ++sequence) {
      if (ranks % sequence != 0) continue;
      for (int stage = 0; stage <= 3; ++stage) jobs.push_back({ranks / sequence, sequence, stage});
    }
  }
  return jobs;
}

// Two groups, fewer elements than ranks, k·dp ± 1, 0-d, zero-size, frozen, tied, a buffer.
Model fixed_model(bool round_robin) {
  Model model{.seed = 42, .dtype = DType::kBFloat16};
  model.parameters = {
      {"embed", {5, 7}, 0, "head"}, {"up", {15}, 0},     {"scale", {}, 1}, {"frozen", {9}, -1},
      {"down", {3, 3}, 0},          {"none", {0, 4}, 0}, {"bias", {3}, 1}};
  model.buffers = {{"running", DType::kFloat32, {4}}};
  model.states = {{"exp_avg"}, {"exp_avg_sq"}};
  model.scalars = {{"step"}};
  model.round_robin = round_robin;
  model.sub_group_size = 8;
  return model;
}

std::string text(const Job& a, const Job& b) {
  std::ostringstream out;
  out << a << " to " << b;
  return out.str();
}

std::string folder_of(const Job& job) {
  return "/dp" + std::to_string(job.data) + "sp" + std::to_string(job.sequence) + "z" +
         std::to_string(job.stage);
}

// Sources for every job; stage 0 by production, from stage 1.
std::vector<ShardedState> all_sources(Workshop* workshop) {
  std::vector<ShardedState> states;
  for (const Job& job : all_jobs()) {
    if (job.stage > 0) {
      states.push_back(workshop->source(job, folder_of(job)));
      continue;
    }
    const ShardedState whole = workshop->source({1, 1, 1}, folder_of(job) + "from");
    states.push_back(workshop->reshard(whole, job, folder_of(job)));
  }
  return states;
}

TEST(Pairs, EveryPlanCoversEveryElementOnce) {
  const std::vector<Job> jobs = all_jobs();
  int64_t plans = 0, transfers = 0;
  for (const bool round_robin : {false, true}) {
    const Model model = fixed_model(round_robin);
    Workshop workshop(model);
    const std::vector<ShardedState> sources = all_sources(&workshop);
    for (size_t i = 0; i < jobs.size(); ++i) {
      for (size_t k = 0; k < jobs.size(); ++k) {
        if (round_robin && (i * 7 + k) % 8 != 0) continue;  // every job on both sides
        const reshard::ReshardPlan plan =
            reshard::make_plan(sources[i], workshop.blueprints(sources[i], jobs[k]));
        ASSERT_EQ(cover_difference(sources[i], plan.blueprints, jobs[k].stage), "")
            << text(jobs[i], jobs[k]);
        ++plans;
        transfers += static_cast<int64_t>(plan.transfers.size());
      }
    }
  }
  std::cout << plans << " plans, " << transfers << " transfers\n";
  EXPECT_GE(plans, 6400);
}

std::string pair_difference(Workshop* workshop, const Model& model, const ShardedState& source,
                            const Job& target) {
  const ShardedState state = workshop->reshard(source, target, "/target");
  std::string reason = state_difference(state, model);
  if (reason.empty()) reason = file_difference(workshop->storage(), "/target", model, target);
  workshop->storage().remove_tree("/target");
  return reason;
}

TEST(Pairs, EveryJobIsReadAndWrittenThroughFiles) {
  const Model model = fixed_model(false);
  Workshop workshop(model);
  const std::vector<Job> jobs = all_jobs();
  const std::vector<ShardedState> sources = all_sources(&workshop);
  for (size_t i = 0; i < jobs.size(); ++i) {
    const size_t k = (i * 37 + 11) % jobs.size();  // a permutation: each once as a target too
    ASSERT_EQ(pair_difference(&workshop, model, sources[i], jobs[k]), "") << text(jobs[i], jobs[k]);
  }
  std::cout << jobs.size() << " jobs\n";
}

TEST(Pairs, SampledPairsThroughFiles) {
  const Model model = fixed_model(true);
  Workshop workshop(model);
  const std::vector<Job> jobs = all_jobs();
  const std::vector<ShardedState> sources = all_sources(&workshop);
  Random random(20240607);
  const int pairs = std::min(2000, std::max(20, cases_for(3) * 2));
  for (int n = 0; n < pairs; ++n) {
    const size_t i = static_cast<size_t>(random.below(static_cast<int64_t>(jobs.size())));
    const size_t k = static_cast<size_t>(random.below(static_cast<int64_t>(jobs.size())));
    ASSERT_EQ(pair_difference(&workshop, model, sources[i], jobs[k]), "") << text(jobs[i], jobs[k]);
  }
  std::cout << pairs << " pairs, seed 20240607\n";
}

// Longer than one chunk of the executor (1 MiB) and than its shortest hole, at odd offsets.
TEST(Pairs, ALargeTensorCrossesChunks) {
  Model model = fixed_model(true);
  model.parameters[1].shape = {300'001};
  model.parameters[4].zeros = true;
  model.parameters[4].shape = {90'000};
  Workshop workshop(model);
  const ShardedState source = workshop.source({3, 1, 2}, "/a");
  for (const Job& job : {Job{4, 1, 3}, Job{1, 2, 1}, Job{7, 1, 2}}) {
    EXPECT_EQ(pair_difference(&workshop, model, source, job), "") << job;
  }
}

}  // namespace
}  // namespace isoshard::properties
