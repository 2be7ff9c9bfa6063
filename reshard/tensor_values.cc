// See tensor_values.h.
#include "reshard/tensor_values.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "core/cast.h"
#include "core/check.h"
#include "core/error.h"
#include "core/mutant.h"

namespace isoshard::reshard {
namespace {

constexpr int64_t kUnordered = std::numeric_limits<int64_t>::max();

uint64_t load_bits(std::span<const std::byte> element) {
  uint64_t bits = 0;
  std::memcpy(&bits, element.data(), std::min<size_t>(element.size(), sizeof bits));
  return bits;
}

template <typename Number>
std::string number_text(Number value) {
  char buffer[64];
  const std::to_chars_result end = std::to_chars(buffer, buffer + sizeof buffer, value);
  return {buffer, end.ptr};
}

// Sign and magnitude as one ordered integer: neighbours in value are neighbours in number.
int64_t ordered(uint64_t bits, int width) {
  const uint64_t sign = uint64_t{1} << (width - 1);
  const auto magnitude = static_cast<int64_t>(bits & (sign - 1));
  return (bits & sign) != 0 && !mutant("ulp_across_zero") ? -magnitude : magnitude;
}

// The magnitude of infinity; 0 for a dtype without an order that is known here.
uint64_t infinity_bits(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 0x7FF0000000000000u;
    case DType::kFloat32:
      return 0x7F800000u;
    case DType::kFloat16:
      return 0x7C00u;
    case DType::kBFloat16:
      return 0x7F80u;
    default:
      return 0;
  }
}

}  // namespace

void read_elements(const checkpoint::ShardedState& state, const checkpoint::Leaf& leaf,
                   int64_t begin, std::span<std::byte> target) {
  const int64_t item = item_size_bytes(leaf.dtype);
  auto fragment = std::upper_bound(
      leaf.fragments.begin(), leaf.fragments.end(), begin,
      [](int64_t at, const checkpoint::FileFragment& f) { return at < f.begin + f.count; });
  while (!target.empty()) {
    CHECK(fragment != leaf.fragments.end(), "elements beyond the end of " + leaf.name);
    const int64_t count = std::min(fragment->begin + fragment->count - begin,
                                   static_cast<int64_t>(target.size()) / item);
    const auto bytes = static_cast<size_t>(count * item);
    state.files[static_cast<size_t>(fragment->file)].bytes().read_at(
        fragment->offset_bytes + (begin - fragment->begin) * item, target.first(bytes));
    target = target.subspan(bytes);
    begin += count;
    ++fragment;
  }
}

TensorValues values_of(const checkpoint::ShardedState& state, int leaf,
                       const std::string& section) {
  const checkpoint::Leaf& tensor = state.leaf(leaf);
  const auto read = [&state, &tensor](int64_t begin, std::span<std::byte> target) {
    read_elements(state, tensor, begin, target);
  };
  return {tensor.name, section, tensor.dtype, tensor.shape, read};
}

TensorValues cast_values(const TensorValues& values, DType dtype) {
  TensorValues result = values;
  result.dtype = dtype;
  result.read = [values, dtype](int64_t begin, std::span<std::byte> target) {
    const int64_t count = static_cast<int64_t>(target.size()) / item_size_bytes(dtype);
    cast(values.dtype, read_elements(values, begin, count), dtype, target);
  };
  return result;
}

std::vector<std::byte> read_elements(const TensorValues& values, int64_t begin, int64_t count) {
  std::vector<std::byte> bytes(static_cast<size_t>(count * item_size_bytes(values.dtype)));
  if (count > 0) values.read(begin, bytes);
  return bytes;
}

std::string element_text(DType dtype, std::span<const std::byte> element) {
  const uint64_t bits = load_bits(element);
  switch (dtype) {
    case DType::kFloat64: {
      double value = 0;
      std::memcpy(&value, element.data(), sizeof value);
      return number_text(value);
    }
    case DType::kFloat32: {
      float value = 0;
      std::memcpy(&value, element.data(), sizeof value);
      return number_text(value);
    }
    case DType::kFloat16:
      return number_text(float_from_half(static_cast<uint16_t>(bits)));
    case DType::kBFloat16:
      return number_text(float_from_bfloat16(static_cast<uint16_t>(bits)));
    case DType::kInt64:
      return number_text(static_cast<int64_t>(bits));
    case DType::kInt32:
      return number_text(static_cast<int32_t>(bits));
    case DType::kInt16:
      return number_text(static_cast<int16_t>(bits));
    case DType::kInt8:
      return number_text(static_cast<int>(static_cast<int8_t>(bits)));
    case DType::kUInt8:
    case DType::kUInt16:
    case DType::kUInt32:
    case DType::kUInt64:
      return number_text(bits);
    case DType::kBool:
      return bits != 0 ? "True" : "False";
    default:
      return element_bits(element);
  }
}

std::string element_bits(std::span<const std::byte> element) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text = "0x";
  for (size_t i = element.size(); i-- > 0;) {
    const auto byte = static_cast<unsigned>(element[i]);
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

Shape index_of(int64_t element, const Shape& shape) {
  Shape index(shape.size());
  for (size_t i = shape.size(); i-- > 0;) {
    const int64_t extent = std::max<int64_t>(shape[i], 1);
    index[i] = element % extent;
    element /= extent;
  }
  return index;
}

int64_t ulp_distance(DType dtype, std::span<const std::byte> a, std::span<const std::byte> b) {
  const uint64_t infinity = infinity_bits(dtype);
  const uint64_t bits_a = load_bits(a), bits_b = load_bits(b);
  if (bits_a == bits_b && a.size() <= sizeof bits_a) return 0;
  if (infinity == 0) return kUnordered;
  const int width = static_cast<int>(8 * item_size_bytes(dtype));
  const int64_t x = ordered(bits_a, width), y = ordered(bits_b, width);
  const auto limit = static_cast<int64_t>(infinity);
  if ((std::abs(x) > limit || std::abs(y) > limit) && !mutant("ulp_of_nan"))
    return kUnordered;  // a NaN
  if (x < 0 && y > 0 && y > kUnordered + x) return kUnordered;
  if (y < 0 && x > 0 && x > kUnordered + y) return kUnordered;
  return x > y ? x - y : y - x;
}

std::string plain_name(const std::string& name) {
  const bool plain = !name.empty() && std::all_of(name.begin(), name.end(), [](unsigned char c) {
    return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c == '.' ||
           c == '_' || c == '-' || c == '/';
  });
  return plain ? name : quote(name);
}

}  // namespace isoshard::reshard
