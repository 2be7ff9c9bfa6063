// See simulation.h.
#include "properties/simulation.h"

#include <bit>

#include "checkpoint/cancel.h"
#include "core/hex_float.h"
#include "core/random.h"

namespace isoshard::properties {
namespace {

using engine::CheckpointEngine;
using engine::Json;
using reference::StepReport;
using reference::TrainConfig;
using reference::Trainer;

}  // namespace

Simulation::Simulation(const TrainConfig& config, uint64_t seed, Hooks hooks)
    : config_(config), seed_(seed), hooks_(std::move(hooks)), bridge_(storage_, config, seed) {}

Simulation::~Simulation() = default;

void Simulation::run(const Leg& leg) {
  TrainConfig config = config_;
  config.stage = leg.stage;
  const bool resumes = legs_ > 0;
  bool by_files = resumes && !saved_.empty();
  ++legs_;
  sim::Cluster cluster(leg.topology, {.seed = keyed_random(seed_, {static_cast<uint64_t>(legs_)})});
  std::vector<std::unique_ptr<Trainer>> trainers(static_cast<size_t>(leg.topology.world()));
  const std::string reason = bridge_.unsupported(leg);
  if (!reason.empty() || !bridge_.leads(last_, leg)) by_files = false;
  if (by_files) {
    const bool same = last_.topology == leg.topology && last_.stage == leg.stage;
    if (!same) {
      const std::string folder = "/leg" + std::to_string(legs_);
      bridge_.bring(saved_, folder, leg);
      saved_ = folder;
      ++record_.files_legs;
    }
  }
  const reference::WholeState before = std::move(record_.state);
  const std::string save_dir = "/saved" + std::to_string(legs_);
  const TraceTeller teller{cluster, leg, hooks_.on_trace};
  reference::LayoutCache layouts;
  cluster.run([&](sim::Rank& rank) {
    const ParallelState parallel = parallel_state(rank);
    auto& trainer = trainers[static_cast<size_t>(rank.number())];
    ParallelState trained = parallel;
    if (hooks_.groups) hooks_.groups(&trained, rank);
    trainer = std::make_unique<Trainer>(config, trained, &layouts);
    CheckpointEngine files(storage_, parallel, deepspeed_config(config, leg.topology, leg.stage),
                           [](const std::string&) {});
    if (by_files) {
      const Json client =
          files.load_checkpoint(&trainer->state(), saved_, {.clean_client_state = true})
              .client_state;
      take_client_state(client, &trainer->state());
      trainer->refresh_parameters();
    } else if (resumes) {
      trainer->adopt(before, counted_);
    } else {
      trainer->initialise();
    }
    if (resumes && hooks_.after_load) hooks_.after_load(trainer.get(), rank.number());
    for (int step = 0; step < leg.steps; ++step) {
      checkpoint::throw_if_cancelled();
      const StepReport report = trainer->step();
      if (hooks_.after_step) hooks_.after_step(trainer.get(), rank.number());
      if (rank.number() == 0) record_.steps.push_back(report);
    }
    if (reason.empty()) {
      files.save_checkpoint(trainer->state(), save_dir,
                            {.client_state = client_state(trainer->state())});
    }
  });
  saved_ = reason.empty() ? save_dir : "";
  last_ = leg;
  std::vector<const TrainingState*> states;
  for (const auto& trainer : trainers) states.push_back(&trainer->state());
  record_.state = reference::whole_state(states);
  counted_.counters = trainers[0]->state().counters;
  counted_.fixed_largest = trainers[0]->state().fixed_largest;
  counted_.loss_scale = trainers[0]->state().loss_scale;
  record_.trace_hash = mix(record_.trace_hash ^ cluster.trace().hash());
  record_.events += static_cast<int64_t>(cluster.trace().events().size());
}

Record single_rank(const TrainConfig& config, int steps,
                   std::vector<reference::WholeState>* behind) {
  Record record;
  TrainConfig alone = config;
  alone.stage = 0;
  sim::Cluster cluster({});
  cluster.run([&](sim::Rank& rank) {
    Trainer trainer(alone, parallel_state(rank));
    trainer.initialise();
    const auto keep = [&] {
      if (behind != nullptr) behind->push_back(reference::whole_state({&trainer.state()}));
    };
    keep();
    for (int step = 0; step < steps; ++step) {
      checkpoint::throw_if_cancelled();
      record.steps.push_back(trainer.step());
      keep();
    }
    record.state = reference::whole_state({&trainer.state()});
  });
  return record;
}

std::string step_difference(const StepReport& a, const StepReport& b) {
  if (std::bit_cast<uint32_t>(a.loss) != std::bit_cast<uint32_t>(b.loss)) {
    return "loss " + hex_float(b.loss) + ", on one rank " + hex_float(a.loss);
  }
  if (a.tokens != b.tokens) return "another number of tokens with a loss";
  if (std::bit_cast<uint64_t>(a.norm) != std::bit_cast<uint64_t>(b.norm)) {
    return "norm " + hex_float(b.norm) + ", on one rank " + hex_float(a.norm);
  }
  return a.skipped != b.skipped ? "skipped on one side only" : "";
}

std::string difference(const Record& expected, const Record& found) {
  const size_t steps = std::min(expected.steps.size(), found.steps.size());
  for (size_t i = 0; i < steps; ++i) {
    const std::string reason = step_difference(expected.steps[i], found.steps[i]);
    if (!reason.empty()) return "step " + std::to_string(i + 1) + ": " + reason;
  }
  if (expected.steps.size() != found.steps.size()) return "another number of steps";
  return reference::difference(expected.state, found.state);
}

}  // namespace isoshard::properties
