// Simulated runs: whole lifecycles, changes of topology through files, and one step of many ranks.
#include <benchmark/benchmark.h>

#include <chrono>

#include "core/check.h"
#include "properties/layout_case.h"
#include "sim/topologies/catalog.h"

namespace isoshard {
namespace {

using properties::CaseLimits;
using properties::CaseResult;

void run_cases(benchmark::State& state, const CaseLimits& limits) {
  uint64_t number = 0;
  for (auto _ : state) {
    const CaseResult result = run_case(properties::seeded_case(1, number++, limits));
    CHECK(result.reason.empty(), result.reason);
  }
  state.counters["cases_per_minute"] =
      benchmark::Counter(60.0 * static_cast<double>(number), benchmark::Counter::kIsRate);
}

// 20 steps with a change of topology and stage every 3, and the same on one rank, on one core.
void lifecycle(benchmark::State& state) { run_cases(state, {sim::topologies_up_to(8), 20, 3}); }
BENCHMARK(lifecycle)->Unit(benchmark::kMillisecond);

// Given values saved by every rank of one topology, resharded, loaded by every rank of another and
// compared, each by files. Both numbers of ranks are drawn evenly among their powers of two.
void save_reshard_load(benchmark::State& state) {
  const std::vector<Topology> topologies = sim::topologies_up_to(static_cast<int>(state.range(0)));
  uint64_t number = 0;
  int64_t ranks = 0;
  for (auto _ : state) {
    state.PauseTiming();
    const properties::LayoutCase value = properties::seeded_layout_case(1, number++, topologies);
    state.ResumeTiming();
    ranks += value.from.topology.world() + value.to.topology.world();
    const std::string reason = layout_difference(value);
    CHECK(reason.empty(), reason);
  }
  state.counters["cases_per_minute"] =
      benchmark::Counter(60.0 * static_cast<double>(number), benchmark::Counter::kIsRate);
  state.counters["ranks_mean"] = static_cast<double>(ranks) / (2.0 * static_cast<double>(number));
}
BENCHMARK(save_reshard_load)->Arg(8)->Arg(64)->Unit(benchmark::kMillisecond)->MinTime(3.0);

// A step of training on each of two topologies and the same on one rank, with what is above between
// them: dense models, each number of ranks as likely as any.
void step_save_reshard_load(benchmark::State& state) {
  std::vector<Topology> topologies;
  for (int data = 1; data <= state.range(0); ++data) topologies.push_back({.data = data});
  run_cases(state, {topologies, 2, 1});
}
BENCHMARK(step_save_reshard_load)->Arg(8)->Arg(64)->Unit(benchmark::kMillisecond);

// One step of the tiny model, without what comes before and behind it.
void step(benchmark::State& state) {
  const int ranks = static_cast<int>(state.range(0));
  reference::TrainConfig config;
  config.data.batch = ranks;
  config.data.sequence_length = 4;
  config.stage = 1;
  float expected = 0;
  { expected = properties::single_rank(config, 1).steps[0].loss; }
  for (auto _ : state) {
    sim::Cluster cluster({.data = ranks}, {.stack_bytes = 128 * 1024});
    std::vector<std::unique_ptr<reference::Trainer>> trainers(static_cast<size_t>(ranks));
    reference::LayoutCache layouts;
    std::chrono::steady_clock::time_point begin;
    cluster.run([&](sim::Rank& rank) {
      auto& trainer = trainers[static_cast<size_t>(rank.number())];
      trainer =
          std::make_unique<reference::Trainer>(config, properties::parallel_state(rank), &layouts);
      trainer->initialise();
      rank.group(GroupKind::kWorld).barrier();
      if (rank.number() == 0) begin = std::chrono::steady_clock::now();
      rank.group(GroupKind::kWorld).barrier();
      const float loss = trainer->step().loss;
      CHECK(loss == expected, "another loss than on one rank");
    });
    state.SetIterationTime(
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
}
BENCHMARK(step)->Arg(1)->Arg(64)->Arg(1024)->UseManualTime()->Iterations(2)->Unit(
    benchmark::kMillisecond);

}  // namespace
}  // namespace isoshard
