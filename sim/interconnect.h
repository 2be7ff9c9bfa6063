// What all boards and storages of a cluster share: the scheduler, the faults and where each rank
// stands among its operations, and who waits in which call. See sim/cluster.h.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "core/collective_trace.h"
#include "sim/faults.h"
#include "sim/scheduler.h"

namespace isoshard::sim {

class GroupBoard;
struct Call;

struct Interconnect {
  Interconnect(uint64_t seed, size_t stack_bytes, int ranks)
      : scheduler(seed, stack_bytes),
        operations(static_cast<size_t>(ranks), 0),
        reads(static_cast<size_t>(ranks)),
        waits(static_cast<size_t>(ranks)) {}

  // What a rank waits in; the board can say for whom.
  struct Wait {
    const GroupBoard* board = nullptr;  // null: it does not wait
    const Call* call = nullptr;
    int64_t sequence = 0;
  };

  Scheduler scheduler;
  Faults faults;
  CollectiveTrace* trace = nullptr;
  std::vector<int64_t> operations;  // of each rank so far
  // Of each rank so far. Threads of a rank may read at once; then their numbers are in any order.
  std::vector<std::atomic<int64_t>> reads;
  std::vector<Wait> waits;
  std::vector<int> dead;
  std::vector<FaultKind> struck;  // faults that have done something, in order
  std::vector<size_t> used;       // numbers in `faults` of those that have found their send
  std::vector<int> overtakable;   // ranks whose call is held back until it is overtaken

  bool is_dead(int rank) const;
  // The fault that stands at the rank's next operation, if any; counts the operation.
  const Fault* next_operation(int rank);
  // The same for its next read of an open file.
  const Fault* next_read(int rank);
  // Whether a kDrop or a kDuplicate has waited for the send that the rank is at.
  bool strikes_send(int rank, FaultKind kind);
  // Holds the running rank's call back, as kDelay and kReorder do.
  void hold_back(int rank, const Fault& fault);
  // The rank has handed over values where others see them: what is held back until then goes on.
  void overtake();
  void wake(int rank);
  [[noreturn]] void die(int rank);

 private:
  const Fault* count(int rank, int64_t number, bool of_reads);
};

}  // namespace isoshard::sim
