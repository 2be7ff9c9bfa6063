// See bit_difference.h.
#include "reshard/bit_difference.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "reshard/statistics.h"
#include "reshard/tensor_values.h"

namespace isoshard::reshard {
namespace {

bool is_nan(DType dtype, std::span<const std::byte> element) {
  return is_floating(dtype) && has_values(dtype) && std::isnan(value_of(dtype, element));
}

bool is_zero(DType dtype, std::span<const std::byte> element) {
  if (has_values(dtype)) return value_of(dtype, element) == 0;
  return std::ranges::all_of(element, [](std::byte byte) { return byte == std::byte{0}; });
}

}  // namespace

void BitDifference::add(std::span<const std::byte> expected, std::span<const std::byte> found) {
  ++count_;
  int bits = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    const auto changed = static_cast<uint8_t>(expected[i] ^ found[i]);
    bits += std::popcount(changed);
    if (changed != 0) bit_ = static_cast<int>(8 * i) + std::countr_zero(changed);
  }
  single_bits_ += bits == 1;
  const bool zero = is_zero(dtype_, found);
  zeros_ += zero;
  zero_signs_ += zero && is_zero(dtype_, expected);
  nan_payloads_ += is_nan(dtype_, expected) && is_nan(dtype_, found);
  ulp_most_ = std::max(ulp_most_, ulp_distance(dtype_, expected, found));
}

std::string BitDifference::text() const {
  if (count_ == 0) return "";
  if (zero_signs_ == count_) return "the sign of zero alone";
  if (nan_payloads_ == count_) return "payloads of NaN alone";
  std::string ulps;
  if (ulp_most_ > 0 && ulp_most_ < std::numeric_limits<int64_t>::max())
    ulps = ", at most " + std::to_string(ulp_most_) + " ulp";
  if (single_bits_ == count_)
    return (count_ == 1 ? "one bit (bit " + std::to_string(bit_) + ")" : "one bit in each") + ulps;
  if (zeros_ == count_) return "zeros instead of values";
  return ulps.empty() ? "no near values" : ulps.substr(2);
}

bool BitDifference::looks_like_damage() const {
  return (count_ == 1 && single_bits_ == 1) || zero_signs_ == count_ || nan_payloads_ == count_;
}

}  // namespace isoshard::reshard
