// A made-up run, drawn number by number: by a seed on the command line, by RapidCheck in the
// properties, so that both mean the same cases.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "properties/simulation.h"

namespace isoshard::properties {

// A number in [low, high]; the low end is the simplest.
using Draw = std::function<int64_t(int64_t low, int64_t high)>;

struct SimulationCase {
  reference::TrainConfig config;
  std::vector<Leg> legs;
  uint64_t seed = 1;  // of the schedulers
  int steps() const;
};

struct CaseLimits {
  std::vector<Topology> topologies;
  int steps = 20;
  int every = 3;  // steps between two changes of topology and stage
};

reference::TrainConfig draw_config(const Draw& draw);

// Makes SGD's first momentum the gradient itself: float32, without scale, clipping and decay.
void show_gradients(reference::TrainConfig* config);

bool fits(const reference::ModelConfig& model, const Topology& topology);

// Those of the topologies that the model can have; a model that can have none gets what the first
// asks for. Error(kUsage) if that does not help.
std::vector<Topology> fitting(const std::vector<Topology>& topologies,
                              reference::TrainConfig* config);

// Topologies that the drawn model cannot have are passed over; Error(kUsage) if that leaves none.
SimulationCase draw_case(const Draw& draw, const CaseLimits& limits);

// Case `number` of a seed.
SimulationCase seeded_case(uint64_t seed, uint64_t number, const CaseLimits& limits);

// The model, the data and how it is trained, in a line each.
// One to four names of tensors that optimizers keep.
std::vector<std::string> draw_state_names(const Draw& draw);

std::string text_of(const reference::TrainConfig& config);
// Which of these legs have no files, and to which no way leads by files, and why; a line each.
std::string text_of_memory(const reference::TrainConfig& config, const std::vector<Leg>& legs);
// The same, and the legs.
std::string text_of(const SimulationCase& value);

struct CaseResult {
  std::string reason;  // empty: the run is the run on one rank
  uint64_t trace_hash = 0;
  int64_t events = 0;
  int64_t changes = 0;        // of topology and stage
  int64_t files_changes = 0;  // those that went through DeepSpeed's files
};
// Throws Error(kInterrupted) after a signal, and std::bad_alloc.
CaseResult run_case(const SimulationCase& value, const OnTrace& on_trace = {});

}  // namespace isoshard::properties
