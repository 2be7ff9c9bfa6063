// What can go wrong between ranks, placed at an operation of a rank: its n-th call of a
// communicator or a storage, counted from 0 (reads of a file that is open do not count). A fault
// that does not fit the operation does nothing, but for kDrop, which waits for the next send.
#pragma once

#include <cstdint>
#include <vector>

namespace isoshard::sim {

enum class FaultKind {
  kDieBefore,     // the rank ends before it takes part in the operation
  kDieInside,     // it has come to the operation, and ends before that is done
  kDieAfter,      // it ends once its part is done
  kCorrupt,       // one bit of what it hands over is turned over on the way
  kDrop,          // what it sends never arrives (send alone): the other side waits
  kDuplicate,     // what it sends arrives twice (send alone): the next receive gets it again
  kDiskFull,      // the storage operation fails: no space
  kQuota,         // no space within the quota
  kReadOnly,      // the file system is mounted read-only
  kNoPermission,  // the user may not
  kStaleHandle,   // NFS has forgotten the file
  kSlow,          // it gets one turn in sixteen from there on
};

const char* name(FaultKind kind);  // "death before", "disk full"
bool is_of_disk(FaultKind kind);   // kDiskFull to kStaleHandle: a storage operation fails

struct Fault {
  FaultKind kind = FaultKind::kDieBefore;
  int rank = 0;
  int64_t operation = 0;
  uint64_t choice = 0;  // kCorrupt: which bit, modulo their number
};

using Faults = std::vector<Fault>;

// Thrown on a rank that dies, by its communicators and storages, again and again.
struct RankDied {
  int rank = 0;
};

}  // namespace isoshard::sim
