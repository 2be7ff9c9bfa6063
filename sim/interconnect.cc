// See interconnect.h.
#include "sim/interconnect.h"

#include <algorithm>
#include <limits>

#include "checkpoint/cancel.h"

namespace isoshard::sim {

bool Interconnect::is_dead(int rank) const {
  return std::find(dead.begin(), dead.end(), rank) != dead.end();
}

void Interconnect::die(int rank) {
  if (!is_dead(rank)) {
    dead.push_back(rank);
    struck.push_back(FaultKind::kDieBefore);
  }
  throw RankDied{rank};
}

const Fault* Interconnect::next_operation(int rank) {
  if (scheduler.stopping()) throw TaskStopped{};
  checkpoint::throw_if_cancelled();
  if (is_dead(rank)) throw RankDied{rank};
  return count(rank, operations[static_cast<size_t>(rank)]++, false);
}

const Fault* Interconnect::next_read(int rank) {
  if (scheduler.stopping()) throw TaskStopped{};
  checkpoint::throw_if_cancelled();
  if (is_dead(rank)) throw RankDied{rank};
  return count(rank, reads[static_cast<size_t>(rank)]++, true);
}

const Fault* Interconnect::count(int rank, int64_t number, bool of_reads) {
  for (const Fault& fault : faults) {
    if (fault.rank != rank || fault.operation != number || fault.of_reads != of_reads) continue;
    if (fault.kind == FaultKind::kSlow) {
      scheduler.set_eagerness(rank, 1.0 / 16);
      struck.push_back(fault.kind);
    }
    return &fault;
  }
  return nullptr;
}

bool Interconnect::strikes_send(int rank, FaultKind kind) {
  const int64_t at = operations[static_cast<size_t>(rank)] - 1;
  for (size_t i = 0; i < faults.size(); ++i) {
    const bool due = faults[i].kind == kind && faults[i].rank == rank && !faults[i].of_reads &&
                     faults[i].operation <= at;
    if (!due || std::find(used.begin(), used.end(), i) != used.end()) continue;
    used.push_back(i);
    struck.push_back(kind);
    return true;
  }
  return false;
}

void Interconnect::hold_back(int rank, const Fault& fault) {
  constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
  struck.push_back(fault.kind);
  if (fault.kind == FaultKind::kDelay) {
    scheduler.pause(static_cast<int64_t>(std::min(fault.choice, uint64_t{kNever})));
    return;
  }
  overtakable.push_back(rank);
  scheduler.pause(kNever);  // which ends too where no other rank can go on
  std::erase(overtakable, rank);
}

void Interconnect::overtake() {
  for (const int rank : overtakable) scheduler.end_pause(rank);
  overtakable.clear();
}

void Interconnect::wake(int rank) {
  waits[static_cast<size_t>(rank)].board = nullptr;
  scheduler.wake(rank);
}

}  // namespace isoshard::sim
