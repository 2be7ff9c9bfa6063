// N ranks in one process: each runs the same body as a task with a stack of its own, and reaches
// the others through communicators alone. Values are real, the order of events is drawn from a
// seed, and nothing waits for ever: where no rank can go on, the error says who waits for whom, and
// at which call.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/collective_trace.h"
#include "core/communicator.h"
#include "core/process_group.h"
#include "core/storage.h"
#include "sim/faults.h"

namespace isoshard::sim {

struct ClusterOptions {
  uint64_t seed = 1;
  size_t stack_bytes = 256 * 1024;
  Faults faults = {};
};

class GroupBoard;
class Cluster;

// What a rank's body is given.
class Rank {
 public:
  int number() const { return number_; }
  const Topology& topology() const;
  // This rank's communicator of that group; the same object every time.
  Communicator& group(GroupKind kind);
  // This rank's way to a disk that others may share too; the object lives as long as the rank.
  Storage& storage(Storage& disk);
  // Communicator and storage operations of this rank so far: where a fault can be placed.
  int64_t operations() const;
  // Reads of open files of this rank so far: where a fault with Fault::of_reads can be placed.
  int64_t reads() const;

 private:
  friend class Cluster;
  Rank(Cluster* cluster, int number) : cluster_(cluster), number_(number) {}
  Cluster* cluster_;
  int number_;
  std::vector<std::pair<std::string, std::unique_ptr<Communicator>>> groups_;
  std::vector<std::unique_ptr<Storage>> storages_;
};

class Cluster {
 public:
  // Throws Error(kUsage) for a topology that cannot be (core/process_group.h).
  explicit Cluster(const Topology& topology, ClusterOptions options = {});
  ~Cluster();

  // Runs the body once on every rank, until all have ended. Throws what the first rank to fail
  // threw, with its number in front of an Error's text; Error(kMismatch) for a deadlock, a lost
  // message among its causes; and Error(kInterrupted) where a rank died and others waited for it.
  void run(const std::function<void(Rank&)>& body);

  const Topology& topology() const { return topology_; }
  const CollectiveTrace& trace() const { return trace_; }
  // Ranks that died by a fault in the last run.
  const std::vector<int>& dead() const { return dead_; }
  // Faults that have done something in the last run; a death is kDieBefore, whichever it was.
  const std::vector<FaultKind>& struck() const { return struck_; }

 private:
  friend class Rank;
  friend class GroupBoard;
  friend class SimulatedCommunicator;
  struct State;

  std::shared_ptr<GroupBoard> board(const std::string& name, const std::vector<int>& ranks);
  [[noreturn]] void report_stuck();

  Topology topology_;
  ClusterOptions options_;
  CollectiveTrace trace_;
  std::vector<int> dead_;
  std::vector<FaultKind> struck_;
  std::unique_ptr<State> state_;
};

}  // namespace isoshard::sim
