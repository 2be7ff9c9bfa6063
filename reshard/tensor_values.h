// A tensor's values wherever they lie, and how one value is printed. diff and its explanations read
// tensors through this, so that tests can hand them tensors in memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/sharded_state.h"
#include "core/dtype.h"

namespace isoshard::reshard {

struct TensorValues {
  std::string name;
  std::string state;  // "weight", "exp_avg", "buffer", …
  DType dtype = DType::kFloat32;
  Shape shape;
  // Fills `target` with elements from `begin` on (row-major); target holds whole elements that the
  // tensor has. Throws what Storage throws.
  std::function<void(int64_t begin, std::span<std::byte> target)> read;

  int64_t size_elements() const { return numel(shape); }
};

// The leaf's values, read where they lie. `state` must outlive the result.
TensorValues values_of(const checkpoint::ShardedState& state, int leaf, const std::string& section);

// The same tensor with every value cast to another dtype as it is read.
TensorValues cast_values(const TensorValues& values, DType dtype);

// Fills `target` with the leaf's elements from `begin` on; they must be there. No CRC is checked.
void read_elements(const checkpoint::ShardedState& state, const checkpoint::Leaf& leaf,
                   int64_t begin, std::span<std::byte> target);

// Elements [begin, begin + count).
std::vector<std::byte> read_elements(const TensorValues& values, int64_t begin, int64_t count);

// One element: its shortest exact decimal, and its bits as "0x3f800000".
std::string element_text(DType dtype, std::span<const std::byte> element);
std::string element_bits(std::span<const std::byte> element);

// Index of a row-major element by dimension; empty for a 0-d tensor.
Shape index_of(int64_t element, const Shape& shape);

// How many representable values lie between two of them; 0 only for equal bits or -0 and +0;
// INT64_MAX where a NaN takes part, or the dtype has no order that is known here.
int64_t ulp_distance(DType dtype, std::span<const std::byte> a, std::span<const std::byte> b);

// A name from a file, as it can be printed: plain where that is safe, otherwise quoted.
std::string plain_name(const std::string& name);

}  // namespace isoshard::reshard
