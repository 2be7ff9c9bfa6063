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

  // Why a leg of this run has no files: DeepSpeed cannot run it (its heads, its topology), or the
  // engine does not write them. "": it has.
  static std::string unsupported(const reference::TrainConfig& config, const Leg& leg);
  std::string unsupported(const Leg& leg) const { return unsupported(config_, leg); }
  // Why there is no way from the files of one leg to those of another; "": there is.
  static std::string no_way(const reference::TrainConfig& config, const Leg& from, const Leg& to);
  bool leads(const Leg& from, const Leg& to) const { return no_way(config_, from, to).empty(); }
  // Reshards what `latest` names in `from` to a leg's topology and stage, into `to`, and names it
  // there.
  void bring(const std::string& from, const std::string& to, const Leg& leg);

 private:
  std::string donor_of_splits();
  std::string order_of_parameters();

  Storage& storage_;
  reference::TrainConfig config_;
  uint64_t seed_;
};

}  // namespace isoshard::properties
