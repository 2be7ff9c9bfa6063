// What a failed system call means to a person: the road from errno to Error, and the few helpers
// that every system call of this folder shares.
#pragma once

#include <cerrno>
#include <cstdint>
#include <string>

#include "core/storage.h"

namespace isoshard::checkpoint {

struct SystemFailure {
  const char* operation;  // how the message begins: "Writing to the file"
  const std::string& path;
  int64_t needed_bytes = -1;  // -1: not known
  int64_t at_byte = -1;       // of the file; -1: not a matter of one place
};

// Throws the Error that explains `error`, an errno.
[[noreturn]] void fail_system(int error, const SystemFailure& failure);

// The path as the kernel takes it; a NUL, which would silently end it, is an Error(kHostile).
const char* kernel_path(const std::string& path);

// Everything before the last component; "." or "/" when there is nothing.
std::string parent_of(const std::string& path);

// Free space where `path`, or its nearest existing ancestor, lies. Returns 0 or an errno.
int ask_free_space(std::string path, FreeSpace* space);

// Repeats a call that a signal has interrupted.
template <typename Call>
auto retry_interrupted(Call call) {
  auto result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
}

}  // namespace isoshard::checkpoint
