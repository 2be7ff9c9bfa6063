// Cancellation: a signal handler stores the signal's number, and long work asks between two steps
// whether it must stop, so that clean-up runs on an ordinary stack. The flag and the name of the
// folder that a second signal would leave are the globals of the program, because a signal handler
// can reach nothing else.
#pragma once

#include <atomic>
#include <mutex>
#include <string>

#include "core/error.h"

namespace isoshard::checkpoint {

// 0: go on. Otherwise the number of the signal that asked for the end. A handler only stores here.
inline std::atomic<int>& cancel_signal() {
  static_assert(std::atomic<int>::is_always_lock_free, "a signal handler may not wait for a lock");
  static constinit std::atomic<int> signal{0};
  return signal;
}

// The hidden folder that lies there now, as text to print. The length is stored last and cleared
// first, so that a handler, which may come at any moment, sees all of the text or none.
struct HiddenFolder {
  std::atomic<size_t> length{0};
  char text[4400] = {};
};
inline HiddenFolder& hidden_folder() {
  static constinit HiddenFolder folder;
  return folder;
}

// Of one folder at a time; an empty path: there is none any more. Never called by a handler.
inline void note_hidden_folder(const std::string& path) {
  static constinit std::mutex one_writer;
  const std::lock_guard lock(one_writer);
  HiddenFolder& folder = hidden_folder();
  folder.length = 0;
  const std::string text = path.empty() ? "" : quote(path);
  const size_t length = text.copy(folder.text, sizeof folder.text);
  folder.length = length;
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
