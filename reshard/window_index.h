// Where short windows of bit patterns stand in a set of tensors: the index behind explain.h.
// Windows of one repeated value are left out, because zeros and ones match everywhere. All numbers
// count elements.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "reshard/tensor_values.h"

namespace isoshard::reshard {

// Element `begin` of tensor number `tensor`.
struct Occurrence {
  int tensor = -1;
  int64_t begin = 0;
  auto operator<=>(const Occurrence&) const = default;
};

// Reads a tensor by small overlapping pieces, fetching larger ones.
class ElementCursor {
 public:
  ElementCursor(const TensorValues& values, int64_t chunk);
  // The bytes of elements [begin, begin + count), count <= chunk; valid until the next call.
  std::span<const std::byte> at(int64_t begin, int64_t count);

 private:
  const TensorValues& values_;
  int64_t item_, size_, chunk_;
  int64_t begin_ = 0, end_ = 0;
  std::vector<std::byte> bytes_;
};

class WindowIndex {
 public:
  static constexpr int64_t kWindow = 4;
  static constexpr int64_t kMaxWindows = 1 << 20;

  // Reads those of the tensors that have this dtype; they must outlive the index.
  WindowIndex(const std::vector<TensorValues>& tensors, DType dtype);

  // Every stride-th window of a tensor is indexed, and its first and last one. 1: all of them.
  int64_t stride() const { return stride_; }

  // Where the kWindow elements may stand, at most 64 places, in order; to be compared, as it goes
  // by a hash. None for a window of one repeated value.
  std::vector<Occurrence> find(std::span<const std::byte> window) const;

  // The first and last elements of a tensor, kWindow or as many as there are.
  std::span<const std::byte> head(int tensor) const { return heads_[static_cast<size_t>(tensor)]; }
  std::span<const std::byte> tail(int tensor) const { return tails_[static_cast<size_t>(tensor)]; }

 private:
  struct Entry {
    uint64_t hash = 0;
    Occurrence place;
    auto operator<=>(const Entry&) const = default;
  };
  void add(const TensorValues& values, int tensor);
  void add_window(std::span<const std::byte> window, Occurrence place);

  int64_t item_ = 0;
  int64_t stride_ = 1;
  std::vector<Entry> entries_;  // sorted
  std::vector<std::vector<std::byte>> heads_, tails_;
};

// True when all elements of `item` bytes have the same bits.
bool is_constant(std::span<const std::byte> elements, int64_t item);

}  // namespace isoshard::reshard
