// Made-up training runs on simulated ranks: one topology after another, with a save, a reshard and
// a load between them, against the same run on one rank without any of that. What the properties,
// the command line and the benchmarks run.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "checkpoint/memory_storage.h"
#include "properties/file_bridge.h"
#include "reference/whole_state.h"

namespace isoshard::properties {

// What a run has shown so far.
struct Record {
  std::vector<reference::StepReport> steps;
  reference::WholeState state;  // behind the last step
  uint64_t trace_hash = 0;      // of all clusters
  int64_t events = 0;
  int64_t files_legs = 0;  // changes of topology that went through DeepSpeed's files
};

// What a law does to a rank on the way; the default is nothing.
struct Hooks {
  std::function<void(reference::Trainer*, int rank)> after_load;
  std::function<void(reference::Trainer*, int rank)> after_step;
  // The groups that the training of a rank goes by; its saves and loads go by the true ones.
  std::function<void(ParallelState*, sim::Rank&)> groups;
  // Of each cluster that has ended, also where it failed.
  OnTrace on_trace;
};

// A run that goes from leg to leg. Between two legs the state goes through DeepSpeed's files, saved
// by the engine, resharded by production and loaded by the engine, where both runs have such files;
// otherwise by way of whole tensors.
class Simulation {
 public:
  Simulation(const reference::TrainConfig& config, uint64_t seed, Hooks hooks = {});
  ~Simulation();

  // Throws what fails.
  void run(const Leg& leg);
  const Record& record() const { return record_; }

 private:
  reference::TrainConfig config_;
  uint64_t seed_;
  Hooks hooks_;
  checkpoint::MemoryStorage storage_;
  FileBridge bridge_;
  Record record_;
  std::string saved_;      // save_dir of the last leg; empty: there are no files
  TrainingState counted_;  // counters of the last leg
  Leg last_;
  int legs_ = 0;
};

// The same number of steps on one rank, without a break. `behind`, if given, gets the state behind
// each step, that behind none first.
Record single_rank(const reference::TrainConfig& config, int steps,
                   std::vector<reference::WholeState>* behind = nullptr);

// "" if loss, norm and their like of a step are the same, bit for bit.
std::string step_difference(const reference::StepReport& expected,
                            const reference::StepReport& found);
// "" if losses, norms and the state are the same, bit for bit; otherwise the first difference.
std::string difference(const Record& expected, const Record& found);

}  // namespace isoshard::properties
