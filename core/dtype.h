// Element types and their sizes, named as torch names them (torch/storage.py, c10/core/ScalarType).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace isoshard {

enum class DType : uint8_t {
  kFloat64,
  kFloat32,
  kFloat16,
  kBFloat16,
  kInt64,
  kInt32,
  kInt16,
  kInt8,
  kUInt8,
  kBool,
  kUInt16,
  kUInt32,
  kUInt64,
  kFloat8E4M3FN,
  kFloat8E5M2,
  kFloat8E4M3FNUZ,
  kFloat8E5M2FNUZ,
  kFloat8E8M0FNU,
  kComplex64,
  kComplex128,
};

// Sizes of a tensor, outermost dimension first; empty for a 0-d tensor.
using Shape = std::vector<int64_t>;

int64_t item_size_bytes(DType dtype);
const char* name(DType dtype);                            // "float32"
bool parse_dtype(const std::string& text, DType* dtype);  // from "float32"; false if unknown
bool is_floating(DType dtype);

// Number of elements; nothing for a negative size or a product beyond 2^58 (so that bytes fit 64
// bits). Readers ask this of every shape from a file, so that their refusal names the file.
std::optional<int64_t> checked_numel(const Shape& shape);

// The same, where the shape was checked before; otherwise Error(kCorrupt).
int64_t numel(const Shape& shape);
std::string to_string(const Shape& shape);    // "[13, 10]"
Shape contiguous_stride(const Shape& shape);  // torch's: sizes of 0 count as 1

}  // namespace isoshard
