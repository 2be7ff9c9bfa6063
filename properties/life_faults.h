// Which faults befall a life, and how they are drawn.
#pragma once

#include <string>

#include "properties/simulation_case.h"
#include "sim/faults.h"

namespace isoshard::properties {

struct FaultMenu {
  bool death = false;      // before, inside or after any operation
  bool disk = false;       // full, over quota, read-only, no permission, stale handle
  bool drop = false;       // a message between pipeline stages is lost
  bool slow = false;       // a rank gets one turn in sixteen
  bool late = false;       // a call is seen later by the others, or behind another rank's
  bool duplicate = false;  // a message comes twice
  bool read = false;       // of an open file: EIO, stale handle, or the rank dies
  bool corrupt = false;    // one bit of what is handed over, which no rank notices
  bool any() const { return death || disk || drop || slow || late || duplicate || read || corrupt; }
};

// Some of kFaultWords, or "all" for each of them, or "corrupt", which is never one of all; throws
// Error(kUsage) for anything else.
FaultMenu parse_faults(const std::string& text);
extern const char* const kFaultWords;  // "death,disk,drop,slow,late,duplicate,read"

// The menu has one at least. The rank is to be taken modulo the ranks there are.
sim::Fault draw_fault(const Draw& draw, const FaultMenu& menu);

// "death before at operation 7 of rank 1, modulo the ranks".
std::string text_of(const sim::Fault& fault);

}  // namespace isoshard::properties
