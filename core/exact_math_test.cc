#include "core/exact_math.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "core/random.h"

namespace isoshard::exact {
namespace {

// Of the larger of 2^-1022 and |expected|.
double error(double found, double expected) {
  if (found == expected) return 0.0;
  return std::abs(found - expected) / std::max(std::abs(expected), 0x1p-1022);
}

double uniform(Random* random, double low, double high) {
  return low + (high - low) * static_cast<double>(random->next() >> 11) * 0x1p-53;
}

constexpr double kBound = 0x1p-48;  // as the header says

TEST(ExactMath, AgreesWithLibmWithinTheStatedBound) {
  Random random(11);
  for (int i = 0; i < 100000; ++i) {
    const double x = uniform(&random, -700, 700), y = uniform(&random, -30, 30);
    ASSERT_LT(error(exp(x), std::exp(x)), kBound) << x;
    ASSERT_LT(error(log(exp(x)), std::log(exp(x))), kBound) << x;
    ASSERT_LT(error(tanh(y), std::tanh(y)), kBound) << y;
    ASSERT_LT(error(tanh(y * 0x1p-6), std::tanh(y * 0x1p-6)), kBound) << y;
    ASSERT_LT(error(sigmoid(y), 1.0 / (1.0 + std::exp(-y))), kBound) << y;
    const double angle = uniform(&random, -1e6, 1e6);
    ASSERT_NEAR(sine_cosine(angle).sine, std::sin(angle), kBound) << angle;
    ASSERT_NEAR(sine_cosine(angle).cosine, std::cos(angle), kBound) << angle;
  }
}

TEST(ExactMath, Edges) {
  const double infinity = std::numeric_limits<double>::infinity();
  EXPECT_EQ(exp(0), 1.0);
  EXPECT_EQ(exp(infinity), infinity);
  EXPECT_EQ(exp(-infinity), 0.0);
  EXPECT_EQ(exp(-745.0), std::exp(-745.0));
  EXPECT_TRUE(std::isnan(exp(std::numeric_limits<double>::quiet_NaN())));
  EXPECT_EQ(log(1.0), 0.0);
  EXPECT_EQ(log(0.0), -infinity);
  EXPECT_EQ(log(infinity), infinity);
  EXPECT_TRUE(std::isnan(log(-1.0)));
  EXPECT_LT(error(log(0x1p-1074), std::log(0x1p-1074)), kBound);
  EXPECT_EQ(sigmoid(-800.0), 0.0);
  EXPECT_EQ(tanh(infinity), 1.0);
}

TEST(ExactMath, FloatsAreAlmostAlwaysTheNearest) {
  Random random(12);
  int differ = 0;
  for (int i = 0; i < 100000; ++i) {
    const float x = static_cast<float>(uniform(&random, -80, 80));
    differ +=
        static_cast<float>(exp(x)) != static_cast<float>(std::exp(static_cast<long double>(x)));
  }
  EXPECT_LE(differ, 2);
}

TEST(ExactMath, PowersAreRoundedOnce) {
  for (int64_t n = 0; n < 5000; ++n) {
    for (const double base : {0.9, 0.95, 0.999, 0.99}) {
      const double expected = static_cast<double>(std::pow(static_cast<long double>(base), n));
      ASSERT_LE(error(power(base, n), expected), 0x1p-52) << base << "^" << n;
    }
  }
  EXPECT_EQ(power(0.0, 0), 1.0);
  EXPECT_EQ(power(0.0, 3), 0.0);
}

}  // namespace
}  // namespace isoshard::exact
