// DeepSpeed's files of one run made those of another: read, resharded and written by production.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "core/storage.h"
#include "engine/checkpoint.h"
#include "reference/trainer.h"
#include "sim/cluster.h"

namespace isoshard::properties {

// Some steps on one topology.
struct Leg {
  Topology topology;
  int stage = 0;
  int steps = 3;
  bool operator==(const Leg&) const = default;
};

// "dp2.sp2 stage 3".
std::string to_string(const Leg& leg);

// The DeepSpeed config of a run.
engine::Json deepspeed_config(const reference::TrainConfig& config, const Topology& topology,
                              int stage);

ParallelState parallel_state(sim::Rank& rank);

// What a save carries besides the state, and the way back.
engine::Json client_state(const TrainingState& state);
void take_client_state(const engine::Json& json, TrainingState* state);

// Tells of a cluster's trace when it goes, also where the cluster has failed.
using OnTrace = std::function<void(const CollectiveTrace&, const Leg&)>;
struct TraceTeller {
  const sim::Cluster& cluster;
  const Leg& leg;
  const OnTrace& on_trace;
  ~TraceTeller() {
    if (on_trace) on_trace(cluster.trace(), leg);
  }
};

class FileBridge {
 public:
  // `storage` outlives the object.
  FileBridge(Storage& storage, const reference::TrainConfig& config, uint64_t seed)
      : storage_(storage), config_(config), seed_(seed) {}

  // Why the engine writes no files for a leg of this run; empty: it does.
  static std::string unsupported(const reference::TrainConfig& config, const Leg& leg);
  std::string unsupported(const Leg& leg) const { return unsupported(config_, leg); }
  // Whether there is a way from the files of one leg to those of another: between a PipelineModule
  // and the others there is none, nor to experts folded with tensor-parallel ranks but from
  // themselves.
  static bool leads(const reference::TrainConfig& config, const Leg& from, const Leg& to);
  bool leads(const Leg& from, const Leg& to) const { return leads(config_, from, to); }
  // Reshards what `latest` names in `from` to a leg's topology and stage, into `to`, and names it
  // there.
  void bring(const std::string& from, const std::string& to, const Leg& leg);

 private:
  std::string donor_of_splits();

  Storage& storage_;
  reference::TrainConfig config_;
  uint64_t seed_;
};

}  // namespace isoshard::properties
