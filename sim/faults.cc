// See faults.h.
#include "sim/faults.h"

#include <cstddef>

namespace isoshard::sim {

const char* name(FaultKind kind) {
  constexpr const char* kNames[] = {
      "death before",    "death inside",    "death behind",      "corruption",     "lost message",
      "doubled message", "delayed message", "overtaken message", "disk full",      "quota",
      "read-only disk",  "no permission",   "stale handle",      "disk I/O error", "slow rank"};
  return kNames[static_cast<size_t>(kind)];
}

bool is_of_disk(FaultKind kind) {
  return kind >= FaultKind::kDiskFull && kind <= FaultKind::kIoError;
}

bool is_of_reads(FaultKind kind) {
  return kind == FaultKind::kStaleHandle || kind == FaultKind::kIoError;
}

}  // namespace isoshard::sim
