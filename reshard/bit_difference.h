// How elements that should be equal differ: a flipped bit looks otherwise than other arithmetic.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "core/dtype.h"

namespace isoshard::reshard {

class BitDifference {
 public:
  explicit BitDifference(DType dtype) : dtype_(dtype) {}

  // Two elements whose bytes differ.
  void add(std::span<const std::byte> expected, std::span<const std::byte> found);

  int64_t count() const { return count_; }
  // "the sign of zero alone", "payloads of NaN alone", "one bit (bit 3)", "at most 2 ulp", or that
  // it is none of these.
  std::string text() const;
  // One element and one bit of it, or nothing but signs of zero or payloads of NaN: no training
  // step makes only that.
  bool looks_like_damage() const;

 private:
  DType dtype_;
  int64_t count_ = 0;
  int64_t zero_signs_ = 0, nan_payloads_ = 0, single_bits_ = 0, zeros_ = 0;
  int bit_ = -1;          // of the last single bit
  int64_t ulp_most_ = 0;  // INT64_MAX: no distance is known
};

}  // namespace isoshard::reshard
