// A sum of doubles without any rounding until it is read, so that its order is nothing: for the
// loss and for norms. Digits are integers, so two sums are added digit by digit, by any all_reduce
// of int64. Method: a long accumulator over the whole range of a double (Kulisch).
//
//   value = Σ digit[i] · 2^(32·i − 1088)        each digit keeps 31 bits of room for carries
#pragma once

#include <array>
#include <cstdint>
#include <span>

namespace isoshard {

class ExactSum {
 public:
  static constexpr int kDigits = 68;
  // Digits, then how many NaN, +inf and −inf were added, then what is left of the carries' room.
  static constexpr int kWords = kDigits + 4;

  void add(double value);
  // x² of a float has 48 bits and is exact as a double.
  void add_square(float x) { add(static_cast<double>(x) * static_cast<double>(x)); }

  // The sum, rounded once to nearest even. NaN if a NaN or both infinities were added.
  double value() const;

  // For the wire: sums of words are words of the sum, for up to 2^20 ranks.
  std::span<const int64_t> words() const { return words_; }
  static ExactSum from_words(std::span<const int64_t> words);

 private:
  void carry();
  std::array<int64_t, kWords> words_{};
};

}  // namespace isoshard
