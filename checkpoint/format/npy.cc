// See npy.h.
#include "checkpoint/format/npy.h"

#include "core/check.h"
#include "core/error.h"
#include "core/mutant.h"

namespace isoshard::checkpoint {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kPrefixBytes = 10;

// numpy's code of a dtype; empty when it has none.
std::string code_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return "<f8";
    case DType::kFloat32:
      return "<f4";
    case DType::kFloat16:
      return "<f2";
    case DType::kInt64:
      return "<i8";
    case DType::kInt32:
      return "<i4";
    case DType::kInt16:
      return "<i2";
    case DType::kInt8:
      return "|i1";
    case DType::kUInt8:
      return "|u1";
    case DType::kBool:
      return "|b1";
    case DType::kUInt16:
      return "<u2";
    case DType::kUInt32:
      return "<u4";
    case DType::kUInt64:
      return "<u8";
    case DType::kComplex64:
      return "<c8";
    case DType::kComplex128:
      return "<c16";
    default:
      return "";
  }
}

}  // namespace

std::optional<DType> npy_dtype(DType dtype) {
  if (dtype == DType::kBFloat16) return DType::kFloat32;
  if (code_of(dtype).empty()) return std::nullopt;
  return dtype;
}

std::string npy_head(DType dtype, const Shape& shape) {
  const std::string code = code_of(dtype);
  CHECK(!code.empty(), std::string("no .npy form of ") + name(dtype));
  std::string sizes;
  for (size_t i = 0; i < shape.size(); ++i) sizes += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  if (shape.size() == 1 && !mutant("npy_one_size")) sizes += ",";
  std::string text =
      "{'descr': '" + code + "', 'fortran_order': False, 'shape': (" + sizes + "), }";
  const size_t unpadded = (mutant("npy_unaligned") ? 0 : kPrefixBytes) + text.size() + 1;
  text.append((kAlignment - unpadded % kAlignment) % kAlignment, ' ');
  text += '\n';
  if (text.size() > 0xFFFF) {
    throw Error(ErrorCode::kUnsupported, "The shape is too long for a .npy file.");
  }
  std::string head = "\x93NUMPY";
  head += '\x01';
  head += '\x00';
  head += static_cast<char>(text.size() & 0xFF);
  head += static_cast<char>(text.size() >> 8);
  return head + text;
}

}  // namespace isoshard::checkpoint
