// The table of element types and the arithmetic of shapes.
#include "core/dtype.h"

#include <algorithm>

#include "core/check.h"
#include "core/error.h"
#include "core/mutant.h"

namespace isoshard {
namespace {

struct Row {
  DType dtype;
  const char* name;
  int64_t size_bytes;
  bool floating;
};

constexpr Row kRows[] = {
    {DType::kFloat64, "float64", 8, true},
    {DType::kFloat32, "float32", 4, true},
    {DType::kFloat16, "float16", 2, true},
    {DType::kBFloat16, "bfloat16", 2, true},
    {DType::kInt64, "int64", 8, false},
    {DType::kInt32, "int32", 4, false},
    {DType::kInt16, "int16", 2, false},
    {DType::kInt8, "int8", 1, false},
    {DType::kUInt8, "uint8", 1, false},
    {DType::kBool, "bool", 1, false},
    {DType::kUInt16, "uint16", 2, false},
    {DType::kUInt32, "uint32", 4, false},
    {DType::kUInt64, "uint64", 8, false},
    {DType::kFloat8E4M3FN, "float8_e4m3fn", 1, true},
    {DType::kFloat8E5M2, "float8_e5m2", 1, true},
    {DType::kFloat8E4M3FNUZ, "float8_e4m3fnuz", 1, true},
    {DType::kFloat8E5M2FNUZ, "float8_e5m2fnuz", 1, true},
    {DType::kFloat8E8M0FNU, "float8_e8m0fnu", 1, true},
    {DType::kComplex64, "complex64", 8, false},
    {DType::kComplex128, "complex128", 16, false},
};

const Row& row(DType dtype) {
  const Row& found = kRows[static_cast<int>(dtype)];
  CHECK(found.dtype == dtype, "the dtype table is out of order");
  return found;
}

}  // namespace

int64_t item_size_bytes(DType dtype) { return row(dtype).size_bytes; }
const char* name(DType dtype) { return row(dtype).name; }
bool is_floating(DType dtype) { return row(dtype).floating; }

bool parse_dtype(const std::string& text, DType* dtype) {
  for (const Row& candidate : kRows) {
    if (text == candidate.name) {
      *dtype = candidate.dtype;
      return true;
    }
  }
  return false;
}

std::optional<int64_t> checked_numel(const Shape& shape) {
  int64_t product = 1;
  for (int64_t size : shape) {
    if (size < 0 || __builtin_mul_overflow(product, size, &product) ||
        (product > (1ll << 58) && !mutant("numel_unlimited"))) {
      return std::nullopt;
    }
  }
  return product;
}

int64_t numel(const Shape& shape) {
  const std::optional<int64_t> product = checked_numel(shape);
  if (product) return *product;
  throw Error(ErrorInfo{.code = ErrorCode::kCorrupt,
                        .what = "A tensor's shape is negative or too large.",
                        .expected = "sizes whose product is at most 2^58",
                        .found = to_string(shape),
                        .next = "restore the checkpoint from another copy"});
}

std::string to_string(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(shape[i]);
  }
  return text + "]";
}

Shape contiguous_stride(const Shape& shape) {
  Shape stride(shape.size());
  int64_t step = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    stride[i] = step;
    step *= std::max<int64_t>(shape[i], mutant("stride_of_nothing") ? 0 : 1);
  }
  return stride;
}

}  // namespace isoshard
