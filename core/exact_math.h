// exp, log, tanh, sigmoid, sine, cosine and integer powers with the same bits on every machine.
// libm has variants for each processor; these are explicit IEEE operations on doubles, compiled
// without contraction, and the same source on host and device. Errors stay below 2^-48 of the
// result (of 1 for sine and cosine), so that a float rounded from them is almost always the
// nearest one.
#pragma once

#include <bit>
#include <cstdint>

namespace isoshard::exact {

// x · 2^n for |n| < 2000, by two exact steps where one would leave the range.
constexpr double scale(double x, int n) {
  const int half = n / 2;
  const auto power = [](int k) {
    return std::bit_cast<double>(static_cast<uint64_t>(1023 + k) << 52);
  };
  return x * power(half) * power(n - half);
}

// The integer nearest to x, |x| < 2^51, ties to even.
constexpr double nearest(double x) {
  constexpr double kShift = 6755399441055744.0;  // 1.5 · 2^52
  return (x + kShift) - kShift;
}

constexpr double kLn2High = 0x1.62e42fee00000p-1, kLn2Low = 0x1.a39ef35793c76p-33;

constexpr double exp(double x) {
  if (x != x) return x;
  if (x > 709.79) return std::bit_cast<double>(uint64_t{0x7FF0000000000000});
  if (x < -745.2) return 0.0;
  const double n = nearest(x * 1.4426950408889634);
  const double r = (x - n * kLn2High) - n * kLn2Low;
  double sum = 1.0;  // Σ r^k / k!, from the smallest term on
  for (int k = 14; k >= 1; --k) sum = 1.0 + sum * r / k;
  return scale(sum, static_cast<int>(n));
}

// NaN for x < 0, −inf for 0.
constexpr double log(double x) {
  if (x != x || x < 0) return std::bit_cast<double>(uint64_t{0x7FF8000000000000});
  if (x == 0) return std::bit_cast<double>(uint64_t{0xFFF0000000000000});
  if (x > 0x1.fffffffffffffp1023) return x;
  int exponent = 0;
  if (x < 0x1p-1022) {
    x *= 0x1p54;
    exponent = -54;
  }
  const uint64_t bits = std::bit_cast<uint64_t>(x);
  exponent += static_cast<int>(bits >> 52) - 1023;
  double m = std::bit_cast<double>((bits & 0x000FFFFFFFFFFFFFull) | 0x3FF0000000000000ull);
  if (m > 1.4142135623730951) {
    m *= 0.5;
    exponent += 1;
  }
  const double s = (m - 1.0) / (m + 1.0), square = s * s;
  double sum = 0.0;  // Σ s^(2k) / (2k + 1)
  for (int k = 12; k >= 1; --k) sum = (sum + 1.0 / (2 * k + 1)) * square;
  const double e = exponent;
  return e * kLn2High + (2.0 * s + (2.0 * s * sum + e * kLn2Low));
}

constexpr double sigmoid(double x) {
  if (x >= 0) return 1.0 / (1.0 + exp(-x));
  const double t = exp(x);
  return t / (1.0 + t);
}

constexpr double tanh(double x) {
  const double a = x < 0 ? -x : x;
  double value = 0.0;
  if (a < 0.03125) {  // 1 − exp(−2a) would cancel
    const double q = a * a;
    value = a * (1 + q * (-1.0 / 3 + q * (2.0 / 15 + q * (-17.0 / 315 + q * (62.0 / 2835)))));
  } else {
    const double t = exp(-2.0 * a);
    value = (1.0 - t) / (1.0 + t);
  }
  return x < 0 ? -value : value;
}

struct SineCosine {
  double sine = 0.0;
  double cosine = 1.0;
};

// |x| < 2^30.
constexpr SineCosine sine_cosine(double x) {
  constexpr double kHigh = 0x1.921fb544p0, kMiddle = 0x1.0b4611a6p-34, kLow = 0x1.3198a2e037073p-69;
  const double n = nearest(x * 0.6366197723675814);
  const double r = ((x - n * kHigh) - n * kMiddle) - n * kLow, square = r * r;
  double sine = 1.0, cosine = 1.0;
  for (int k = 10; k >= 1; --k) {
    sine = 1.0 - sine * square / ((2 * k) * (2 * k + 1));
    cosine = 1.0 - cosine * square / ((2 * k - 1) * (2 * k));
  }
  sine *= r;
  switch (static_cast<int64_t>(n) & 3) {
    case 0:
      return {sine, cosine};
    case 1:
      return {cosine, -sine};
    case 2:
      return {-sine, -cosine};
    default:
      return {-cosine, sine};
  }
}

// base^exponent for exponent >= 0, rounded from about 100 bits: products are kept as pairs of
// doubles whose sum they are (Dekker).
constexpr double power(double base, int64_t exponent) {
  struct Pair {
    double high = 1.0, low = 0.0;
  };
  const auto split = [](double a) {
    const double t = 134217729.0 * a;
    return t - (t - a);
  };
  const auto multiply = [&](Pair a, Pair b) {
    const double p = a.high * b.high;
    const double a1 = split(a.high), a2 = a.high - a1, b1 = split(b.high), b2 = b.high - b1;
    const double error = ((a1 * b1 - p) + a1 * b2 + a2 * b1) + a2 * b2;
    const double low = error + (a.high * b.low + a.low * b.high);
    const double high = p + low;
    return Pair{high, low - (high - p)};
  };
  Pair result, factor{base, 0.0};
  for (int64_t rest = exponent; rest > 0; rest >>= 1) {
    if ((rest & 1) != 0) result = multiply(result, factor);
    if (rest > 1) factor = multiply(factor, factor);
  }
  return result.high + result.low;
}

}  // namespace isoshard::exact
