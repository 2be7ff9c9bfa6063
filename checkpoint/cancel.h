// Cancellation: a signal handler stores the signal's number, and long work asks between two steps
// whether it must stop, so that clean-up runs on an ordinary stack. The flag is the one global of
// the program, because a signal handler can reach nothing else.
#pragma once

#include <atomic>
#include <string>

#include "core/error.h"

namespace isoshard::checkpoint {

// 0: go on. Otherwise the number of the signal that asked for the end. A handler only stores here.
inline std::atomic<int>& cancel_signal() {
  static_assert(std::atomic<int>::is_always_lock_free, "a signal handler may not wait for a lock");
  static constinit std::atomic<int> signal{0};
  return signal;
}

// Throws Error(kInterrupted) once a signal has asked for the end.
inline void throw_if_cancelled() {
  const int signal = cancel_signal().load(std::memory_order_relaxed);
  if (signal == 0) return;
  throw Error(
      ErrorInfo{.code = ErrorCode::kInterrupted,
                .what = "The command was interrupted by signal " + std::to_string(signal) + ".",
                .next = "give the same command again; it starts from the beginning"});
}

}  // namespace isoshard::checkpoint
