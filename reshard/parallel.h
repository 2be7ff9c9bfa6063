// Independent pieces of work on a few threads, with the same outcome on every run.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <thread>
#include <vector>

#include "core/threads.h"

namespace isoshard::reshard {

// Calls work(0) … work(count − 1), in order of their numbers but several at a time. After a failure
// no further piece is begun; of several failures the one with the lowest number is thrown.
template <typename Work>
void parallel_for(size_t count, int workers, const Work& work) {
  std::vector<std::exception_ptr> failures(count);
  std::atomic<size_t> next{0};
  std::atomic<bool> stop{false};
  const auto run = [&] {
    for (size_t i = next++; i < count && !stop; i = next++) {
      try {
        work(i);
      } catch (...) {
        failures[i] = std::current_exception();
        stop = true;
      }
    }
  };
  std::vector<std::thread> threads;
  const size_t helpers = std::min<size_t>(static_cast<size_t>(std::max(workers, 1)), count);
  for (size_t i = 1; i < helpers; ++i) {
    if (!try_start(&threads, run)) break;
  }
  run();
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& failure : failures) {
    if (failure) std::rethrow_exception(failure);
  }
}

}  // namespace isoshard::reshard
