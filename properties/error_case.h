// A job of crash_case.h on a disk that reports an error at one of its calls, or from one on, and
// what must hold then:
//
//   the job throws    an Error that says what failed, where, with which errno, what to do next, and
//                     truly whether the new is there; each place is the old one or the new one
//   or it ends well   each place is the new one, and no crash takes that back
//   in both cases     a crash at any later operation, those of the clean-up included, leaves the
//   old
//                     or the new; what lies about is known as a leftover, and is nothing at all
//                     where the clean-up itself met no error
//   the fault ends    the job, given again, ends well
//
// And a job behind a crash of itself: it ends well, and a second crash at any of its operations
// leaves what the first has left, or the new.
//
// Not verified here: errors of two kinds in one run; `doctor --clean` between two runs.
#pragma once

#include <cstdint>
#include <string>

#include "properties/crash_case.h"
#include "properties/mutant_storage.h"

namespace isoshard::properties {

struct ErrorRange {
  uint64_t number = 0;     // of the job
  bool all = false;        // every errno at every call, once and for ever; else one of these each
  uint64_t seeds = 1;      // of durability models that have no end of them
  int64_t most_runs = -1;  // about so many of these, drawn by chance; -1: all
};

struct ErrorTally {
  int64_t runs = 0;   // in which an error struck
  int64_t calls = 0;  // of the storage that the job makes without errors
  int64_t told = 0;   // runs that threw
  int64_t cases = 0;  // runs, and crashes behind the errors under each model
  double seconds = 0;
  int64_t strikes = 0;  // how often the mutant did something wrong
  std::string failure;  // the first; empty: the law holds
};

ErrorTally check_errors(const CrashJob& job, const StorageMutant& mutant, const ErrorRange& range);

// `runs`: first crashes with different outcomes; `cases`: second crashes.
ErrorTally check_nested_crashes(const CrashJob& job, const ErrorRange& range);

}  // namespace isoshard::properties
