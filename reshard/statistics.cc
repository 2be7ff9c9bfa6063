// See statistics.h. long double holds every int64, uint64 and double exactly.
#include "reshard/statistics.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "core/cast.h"
#include "core/check.h"

namespace isoshard::reshard {
namespace {

template <typename Number>
Number load(const std::byte* at) {
  Number value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

// Calls visit with a function from an element's first byte to its number.
template <typename Visit>
void with_decoder(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::kFloat64:
      return visit(load<double>);
    case DType::kFloat32:
      return visit(load<float>);
    case DType::kFloat16:
      return visit([](const std::byte* at) { return float_from_half(load<uint16_t>(at)); });
    case DType::kBFloat16:
      return visit([](const std::byte* at) { return float_from_bfloat16(load<uint16_t>(at)); });
    case DType::kInt64:
      return visit(load<int64_t>);
    case DType::kInt32:
      return visit(load<int32_t>);
    case DType::kInt16:
      return visit(load<int16_t>);
    case DType::kInt8:
      return visit(load<int8_t>);
    case DType::kUInt8:
    case DType::kBool:
      return visit(load<uint8_t>);
    case DType::kUInt16:
      return visit(load<uint16_t>);
    case DType::kUInt32:
      return visit(load<uint32_t>);
    case DType::kUInt64:
      return visit(load<uint64_t>);
    default:
      CHECK(false, std::string("no values in ") + name(dtype));
  }
}

}  // namespace

bool has_values(DType dtype) { return dtype <= DType::kUInt64; }

long double value_of(DType dtype, std::span<const std::byte> element) {
  long double value = 0;
  with_decoder(dtype, [&](const auto& decode) { value = decode(element.data()); });
  return value;
}

std::string value_text(DType dtype, long double value) {
  char buffer[64];
  if (!is_floating(dtype)) {
    std::snprintf(buffer, sizeof buffer, "%.0Lf", value);
    return buffer;
  }
  if (std::isnan(value)) return "nan";
  const auto end = dtype == DType::kFloat64
                       ? std::to_chars(buffer, buffer + sizeof buffer, static_cast<double>(value))
                       : std::to_chars(buffer, buffer + sizeof buffer, static_cast<float>(value));
  return std::string(buffer, end.ptr);
}

std::optional<double> Statistics::mean() const {
  if (count == non_finite) return std::nullopt;
  return sum / static_cast<double>(count - non_finite);
}

void Statistics::add(DType dtype, std::span<const std::byte> elements) {
  with_decoder(dtype, [&](const auto& decode) {
    const auto item = static_cast<size_t>(item_size_bytes(dtype));
    using Number = decltype(decode(elements.data()));
    std::optional<Number> low, high;
    for (size_t at = 0; at < elements.size(); at += item) {
      const Number value = decode(elements.data() + at);
      ++count;
      if constexpr (std::is_floating_point_v<Number>) {
        if (!std::isfinite(value)) {
          ++non_finite;
          continue;
        }
      }
      zeros += value == 0;
      sum += static_cast<double>(value);
      if (!low || value < *low) low = value;
      if (!high || value > *high) high = value;
    }
    if (!low) return;
    minimum = minimum ? std::min<long double>(*minimum, *low) : *low;
    maximum = maximum ? std::max<long double>(*maximum, *high) : *high;
  });
}

}  // namespace isoshard::reshard
