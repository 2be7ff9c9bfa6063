// The elements of a leaf as numbers: reading them from their fragments, and saying what they are.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "checkpoint/sharded_state.h"

namespace isoshard::reshard {

// Fills `target` with the leaf's elements from `begin` on; they must be there. No CRC is checked.
void read_elements(const checkpoint::ShardedState& state, const checkpoint::Leaf& leaf,
                   int64_t begin, std::span<std::byte> target);

// True where elements can be read as real numbers: not for 8-bit floats and complex numbers.
bool has_values(DType dtype);

// One element as a number; exact for every dtype that has values.
long double value_of(DType dtype, std::span<const std::byte> element);

std::string value_text(DType dtype, long double value);       // shortest: "0.1", "-inf"
std::string bits_text(std::span<const std::byte> element);    // "0x3dcccccd"
std::string index_text(const Shape& shape, int64_t element);  // "[2, 0]" of a row-major number

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
