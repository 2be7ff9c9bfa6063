// What the elements of a tensor come to: least, greatest, mean, zeros.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "core/dtype.h"

namespace isoshard::reshard {

// True where elements can be read as real numbers: not for 8-bit floats and complex numbers.
bool has_values(DType dtype);

// One element as a number; exact for every dtype that has values.
long double value_of(DType dtype, std::span<const std::byte> element);

std::string value_text(DType dtype, long double value);  // shortest: "0.1", "-inf"

struct Statistics {
  int64_t count = 0;
  int64_t zeros = 0;       // of either sign
  int64_t non_finite = 0;  // infinities and NaN
  // Over the finite values; nothing when there are none. The sum is taken in double, in order.
  std::optional<long double> minimum, maximum;
  double sum = 0;
  std::optional<double> mean() const;

  // Adds elements of a dtype that has values.
  void add(DType dtype, std::span<const std::byte> elements);
};

}  // namespace isoshard::reshard
