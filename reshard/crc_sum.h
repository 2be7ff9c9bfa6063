// A sum of CRC pieces that arrive in any order from any thread (core/polynomial.h).
#pragma once

#include <atomic>

#include "core/polynomial.h"

namespace isoshard::reshard {

class CrcSum {
 public:
  // A raw CRC of a piece that is followed by `bytes_after` bytes of the whole.
  void add(const CrcPolynomial& polynomial, uint64_t raw, int64_t bytes_after) {
    if (raw != 0) sum_.fetch_xor(polynomial.shift(raw, bytes_after), std::memory_order_relaxed);
  }
  // The sum as a word: those of disjoint pieces add up by XOR.
  uint64_t word() const { return sum_.load(std::memory_order_relaxed); }
  void set_word(uint64_t word) { sum_.store(word, std::memory_order_relaxed); }
  uint64_t finish(const CrcPolynomial& polynomial, int64_t bytes_total) const {
    return polynomial.finish(sum_.load(std::memory_order_relaxed), bytes_total);
  }

 private:
  std::atomic<uint64_t> sum_{0};
};

}  // namespace isoshard::reshard
