// What tests/shim/fault_shim.cc was asked to do: the n-th call of a kind, and what becomes of it.
//
//   CALL:N:WHAT  or  CALL:N+:WHAT (from the n-th on), up to four with commas
//
//   CALL  open pread pwrite fsync syncfs close malloc
//   WHAT  an errno by name | EIO@close, @fsync, @syncfs: this call succeeds, and the next one of
//         that name fails (@close: of the same file)
//         half one none: so much of a read or write is done | flip: one bit of it is wrong
//         lost: a write that does nothing and says that all is well | aside: one 512 bytes off
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

namespace isoshard::shim {

enum Call { kOpen, kPread, kPwrite, kFsync, kSyncfs, kClose, kMalloc, kCalls };
inline constexpr std::array<const char*, kCalls> kCallNames = {"open",   "pread", "pwrite", "fsync",
                                                               "syncfs", "close", "malloc"};

enum class Deed { kError, kHalf, kOne, kNone, kFlip, kLost, kAside };

struct Fault {
  Call call = kCalls;
  int64_t first = 0;  // the first call counts 1
  int64_t last = 0;
  Deed deed = Deed::kError;
  int error = 0;          // kError alone
  Call told_by = kCalls;  // the call that reports it, when that is a later one
};

using FaultPlan = std::array<Fault, 4>;

// Ends the program with 3 and a line on stderr where the text is not understood. Allocates nothing.
FaultPlan parse_faults(std::string_view text);

}  // namespace isoshard::shim
