// Ranks that are processes of their own, started by `mpirun -n N`: the Communicator of OpenMPI.
//
// All bytes go by messages between two ranks, so that groups cost nothing to make, a wait knows
// whom it waits for, and no wait is without an end: where a rank does not answer in time, the Error
// names it, the call and its place in the source. MPI itself ends a job one of whose processes has
// died; the time limit is for the one that is stuck.
//
// One thread a process calls; several worlds a process are a mistake.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "core/communicator.h"
#include "core/process_group.h"

namespace isoshard::reshard {

struct MpiOptions {
  // Before each call all ranks of the group tell each other what they are about to do, and what
  // does not agree is an Error(kMismatch) on every one. Costs two small messages for each pair.
  bool compare_calls = true;
  std::chrono::milliseconds timeout = std::chrono::minutes(2);
};

class MpiTransport;

class MpiWorld {
 public:
  // Whether this process was started by OpenMPI's mpirun.
  static bool is_launched();

  // Error(kUsage) where MPI cannot be started; it has then told why.
  explicit MpiWorld(MpiOptions options = {});
  ~MpiWorld();  // waits for all ranks; after a time-out it cannot, and ends the job by abort()

  Communicator& world();
  int rank() { return world().rank(); }
  int size() { return world().size(); }

  // The communicator of some ranks of the world in this order, this one among them. Each member
  // makes it when it likes; the same name and ranks are the same group.
  std::unique_ptr<Communicator> group(const std::string& name, const std::vector<int>& ranks);
  // The group of this rank (core/process_group.h).
  std::unique_ptr<Communicator> group(const Topology& topology, GroupKind kind);

  // Ends the processes of all ranks: what is left to one that cannot go on.
  [[noreturn]] void abort(int status);

 private:
  std::unique_ptr<MpiTransport> transport_;
  MpiOptions options_;
  std::unique_ptr<Communicator> world_;
};

}  // namespace isoshard::reshard
