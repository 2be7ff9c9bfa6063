// See exact_sum.h.
#include "core/exact_sum.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "core/check.h"
#include "core/mutant.h"

namespace isoshard {
namespace {

constexpr int kBias = 1088;  // 2^-1074 is bit 14
constexpr int kNaN = ExactSum::kDigits, kPlus = kNaN + 1, kMinus = kNaN + 2, kAdded = kNaN + 3;
constexpr int64_t kBase = int64_t{1} << 32;
constexpr int64_t kMostAdded = int64_t{1} << 10;  // terms below 2^32 a digit before a carry

}  // namespace

void ExactSum::add(double value) {
  if (!std::isfinite(value)) {
    ++words_[std::isnan(value) ? kNaN : value > 0 ? kPlus : kMinus];
    return;
  }
  const uint64_t bits = std::bit_cast<uint64_t>(value);
  const int field = static_cast<int>((bits >> 52) & 0x7FF);
  uint64_t fraction = bits & ((uint64_t{1} << 52) - 1);
  if (field != 0) fraction |= uint64_t{1} << 52;
  const int at = std::max(field, 1) - 1075 + kBias;  // of the fraction's lowest bit
  const int digit = at / 32, shift = at % 32;
  const unsigned __int128 wide = static_cast<unsigned __int128>(fraction) << shift;
  for (int k = 0; k < 3; ++k) {
    const int64_t part = static_cast<int64_t>(static_cast<uint64_t>(wide >> (32 * k)) & 0xFFFFFFFF);
    words_[static_cast<size_t>(digit + k)] += value < 0 ? -part : part;
  }
  if (++words_[kAdded] >= kMostAdded) carry();
}

void ExactSum::carry() {
  int64_t carried = 0;
  for (int i = 0; i < kDigits; ++i) {
    int64_t& digit = words_[static_cast<size_t>(i)];
    digit += mutant("exact_sum_carry_lost") ? 0 : carried;
    if (i + 1 == kDigits) break;  // the highest digit keeps the sign
    carried = digit >> 32;
    digit -= carried * kBase;
  }
  words_[kAdded] = 1;
}

ExactSum ExactSum::from_words(std::span<const int64_t> words) {
  CHECK(words.size() == kWords, "not the words of a sum");
  ExactSum sum;
  std::copy(words.begin(), words.end(), sum.words_.begin());
  sum.carry();
  return sum;
}

double ExactSum::value() const {
  if (words_[kNaN] > 0 ||
      (words_[kPlus] > 0 && words_[kMinus] > 0 && !mutant("exact_sum_opposite_infinities"))) {
    return std::numeric_limits<double>::quiet_NaN();
  }
  if (words_[kPlus] > 0) return std::numeric_limits<double>::infinity();
  if (words_[kMinus] > 0) return -std::numeric_limits<double>::infinity();
  ExactSum sum = *this;
  sum.carry();
  const bool negative = sum.words_[kDigits - 1] < 0;
  if (negative) {
    for (int i = 0; i < kDigits; ++i) sum.words_[static_cast<size_t>(i)] *= -1;
    sum.carry();
  }
  int top = kDigits - 1;
  while (top >= 0 && sum.words_[static_cast<size_t>(top)] == 0) --top;
  if (top < 0) return 0.0;
  // The four highest digits hold at least 97 bits; all below is one sticky bit.
  unsigned __int128 wide = 0;
  for (int k = 0; k < 4; ++k) {
    const int i = top - k;
    wide = (wide << 32) | (i < 0 ? 0u : static_cast<uint32_t>(sum.words_[static_cast<size_t>(i)]));
  }
  bool sticky = false;
  for (int i = 0; i < top - 3; ++i) sticky |= sum.words_[static_cast<size_t>(i)] != 0;
  const uint64_t high = static_cast<uint64_t>(wide >> 64);
  const int length =
      high != 0 ? 64 + std::bit_width(high) : std::bit_width(static_cast<uint64_t>(wide));
  const int lowest = 32 * (top - 3) - kBias;  // exponent of bit 0 of wide
  // Bits that are kept: 53, fewer where the result is subnormal.
  const int cut = std::max(length - 53, -1074 - lowest);
  uint64_t kept = static_cast<uint64_t>(cut <= 0 ? wide : cut >= 128 ? 0 : wide >> cut);
  if (cut > 0 && cut < 128) {
    const unsigned __int128 half = static_cast<unsigned __int128>(1) << (cut - 1);
    const unsigned __int128 rest = wide & ((half << 1) - 1);
    if (rest > half ||
        (rest == half && ((sticky && !mutant("exact_sum_sticky_dropped")) || (kept & 1) != 0)))
      ++kept;
  }
  const double magnitude = std::ldexp(static_cast<double>(kept), lowest + std::max(cut, 0));
  return negative ? -magnitude : magnitude;
}

}  // namespace isoshard
