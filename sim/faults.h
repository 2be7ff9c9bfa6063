// What can go wrong between ranks and their disk, placed at an operation of a rank: its n-th call
// of a communicator or a storage, counted from 0. Reads of files that are open are counted apart,
// and Fault::of_reads says that `operation` is such a number. A fault that does not fit the
// operation does nothing, but for kDrop and kDuplicate, which wait for the next send.
//
// Every call of a communicator waits until it is done, so a rank never has two messages on the way,
// and those of one channel keep their order whatever befalls them. What can change is which of two
// ranks' calls the others see first: kReorder is a delay that ends with the event instead of after
// a number of turns. Neither may change a value, because no sum goes by the order of arrival.
#pragma once

#include <cstdint>
#include <vector>

namespace isoshard::sim {

enum class FaultKind {
  kDieBefore,     // the rank ends before it takes part in the operation
  kDieInside,     // it has come to the operation, and ends before that is done
  kDieAfter,      // it ends once its part is done
  kCorrupt,       // one bit of what it hands over is turned over on the way; nobody is told
  kDrop,          // what it sends never arrives (send alone); the receiver finds a gap or waits
  kDuplicate,     // what it sends arrives twice (send alone); the receiver knows it by its number
  kDelay,         // the others see its call only `choice` turns later
  kReorder,       // they see it only behind the next call in which another rank hands over values
  kDiskFull,      // the storage operation fails: no space
  kQuota,         // no space within the quota
  kReadOnly,      // the file system is mounted read-only
  kNoPermission,  // the user may not
  kStaleHandle,   // NFS has forgotten the file
  kIoError,       // the device failed (EIO)
  kSlow,          // it gets one turn in sixteen from there on
};

const char* name(FaultKind kind);  // "death before", "disk full"
bool is_of_disk(FaultKind kind);   // kDiskFull to kIoError: a storage operation fails
bool is_of_reads(FaultKind kind);  // those of them that a read of an open file can meet

struct Fault {
  FaultKind kind = FaultKind::kDieBefore;
  int rank = 0;
  int64_t operation = 0;
  uint64_t choice = 0;    // kCorrupt: which bit, modulo their number; kDelay: turns
  bool of_reads = false;  // `operation` counts reads; deaths, is_of_reads() and kSlow fit there
};

using Faults = std::vector<Fault>;

// Thrown on a rank that dies, by its communicators and storages, again and again.
struct RankDied {
  int rank = 0;
};

}  // namespace isoshard::sim
