// Helpers of a pass over independent pieces: as many threads as the system gives.
#pragma once

#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace isoshard {

// False where there is no room for another thread (limits of memory or of processes); the pieces
// are then left to those that run already, or to the caller.
template <typename Work>
bool try_start(std::vector<std::thread>* threads, Work&& work) {
  try {
    threads->emplace_back(std::forward<Work>(work));
    return true;
  } catch (const std::system_error&) {
    return false;
  } catch (const std::bad_alloc&) {
    return false;
  }
}

}  // namespace isoshard
