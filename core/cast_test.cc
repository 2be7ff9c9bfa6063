// Facts about casts, over every 16-bit pattern. What it does not verify: payloads of NaN, which
// torch itself does not keep in the same way on every processor.
#include "core/cast.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "core/check.h"

namespace isoshard {
namespace {

float from_bits(uint32_t bits) { return std::bit_cast<float>(bits); }
uint32_t bits_of(float value) { return std::bit_cast<uint32_t>(value); }

template <typename Target, typename Source>
std::vector<Target> cast_all(DType source_dtype, const std::vector<Source>& source,
                             DType target_dtype) {
  std::vector<Target> target(source.size());
  cast(source_dtype, std::as_bytes(std::span(source)), target_dtype,
       std::as_writable_bytes(std::span(target)));
  return target;
}

TEST(BFloat16, WideningThenNarrowingIsTheIdentityButForNan) {
  for (uint32_t bits = 0; bits <= 0xFFFF; ++bits) {
    const float wide = float_from_bfloat16(static_cast<uint16_t>(bits));
    ASSERT_EQ(bits_of(wide), bits << 16);
    const bool nan = (bits & 0x7FFF) > 0x7F80;
    ASSERT_EQ(std::isnan(wide), nan) << bits;
    ASSERT_EQ(bfloat16_from_float(wide), nan ? 0x7FC0 : bits) << bits;
  }
}

// Every finite neighbour pair: at the middle the even one wins, one step beside it the nearer one.
TEST(BFloat16, RoundingIsToTheNearestAndTiesGoToEven) {
  for (uint32_t low = 0; low < 0x7F80; ++low) {
    const uint32_t middle = (low << 16) | 0x8000u;
    const uint32_t even = low + (low & 1);
    for (uint32_t sign : {0u, 0x8000u}) {
      const uint32_t s = sign << 16;
      ASSERT_EQ(bfloat16_from_float(from_bits(s | middle)), sign | even) << low;
      ASSERT_EQ(bfloat16_from_float(from_bits(s | (middle - 1))), sign | low) << low;
      ASSERT_EQ(bfloat16_from_float(from_bits(s | (middle + 1))), sign | (low + 1)) << low;
    }
  }
}

TEST(BFloat16, TheLargestFloatsRoundToInfinity) {
  EXPECT_EQ(bfloat16_from_float(std::numeric_limits<float>::max()), 0x7F80);
  EXPECT_EQ(bfloat16_from_float(std::numeric_limits<float>::lowest()), 0xFF80);
  EXPECT_EQ(bfloat16_from_float(from_bits(0x7F7F7FFF)), 0x7F7F);
}

// The value of a half by its definition, exact in double.
double half_value(uint32_t bits) {
  const int exponent = static_cast<int>(bits >> 10 & 0x1F);
  const int mantissa = static_cast<int>(bits & 0x3FF);
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

TEST(Half, WideningIsExactAndNarrowingUndoesItButForNan) {
  for (uint32_t bits = 0; bits <= 0xFFFF; ++bits) {
    const float wide = float_from_half(static_cast<uint16_t>(bits));
    const bool nan = (bits & 0x7FFF) > 0x7C00;
    ASSERT_EQ(std::isnan(wide), nan) << bits;
    if (!nan && (bits & 0x7C00) != 0x7C00) {
      ASSERT_EQ(static_cast<double>(wide), half_value(bits)) << bits;
    }
    ASSERT_EQ(std::signbit(wide), (bits & 0x8000) != 0) << bits;
    const uint32_t expected = nan ? (bits & 0x8000) | 0x7E00 : bits;
    ASSERT_EQ(half_from_float(wide), expected) << bits;
  }
}

TEST(Half, RoundingIsToTheNearestAndTiesGoToEven) {
  for (uint32_t low = 0; low < 0x7C00; ++low) {
    // Above the largest finite half the next value of the grid is 65536, which is infinity.
    const double high = low == 0x7BFF ? 65536.0 : half_value(low + 1);
    const auto middle = static_cast<float>((half_value(low) + high) / 2);
    const uint32_t even = low + (low & 1);
    for (uint32_t sign : {0u, 0x8000u}) {
      const uint32_t s = sign << 16;
      ASSERT_EQ(half_from_float(from_bits(s | bits_of(middle))), sign | even) << low;
      ASSERT_EQ(half_from_float(from_bits(s | (bits_of(middle) - 1))), sign | low) << low;
      ASSERT_EQ(half_from_float(from_bits(s | (bits_of(middle) + 1))), sign | (low + 1)) << low;
    }
  }
}

TEST(Half, WhatIsBeyondTheRangeIsInfinityOrZeroOfTheSameSign) {
  EXPECT_EQ(half_from_float(65519.996f), 0x7BFF);
  EXPECT_EQ(half_from_float(65520.0f), 0x7C00);
  EXPECT_EQ(half_from_float(-1e30f), 0xFC00);
  EXPECT_EQ(half_from_float(std::numeric_limits<float>::infinity()), 0x7C00);
  EXPECT_EQ(half_from_float(std::ldexp(1.0f, -25)), 0x0000);
  EXPECT_EQ(half_from_float(-std::numeric_limits<float>::denorm_min()), 0x8000);
}

// Bits at every 1021st step through all floats, and around each boundary between two forms.
std::vector<uint32_t> many_floats() {
  std::vector<uint32_t> bits;
  for (uint64_t at = 0; at <= 0xFFFFFFFFu; at += 1021) bits.push_back(static_cast<uint32_t>(at));
  for (const uint32_t edge : {0u, 0x33000000u, 0x387FC000u, 0x38800000u, 0x477FE000u, 0x477FF000u,
                              0x47800000u, 0x7F7F8000u, 0x7F800000u, 0x7FC00000u}) {
    for (uint32_t step = 0; step < 9000; ++step) {
      for (const uint32_t sign : {0u, 0x80000000u}) bits.push_back((edge + step - 4500) ^ sign);
    }
  }
  return bits;
}

TEST(Cast, WholeBuffersNarrowLikeOneElement) {
  const std::vector<uint32_t> wide = many_floats();
  const auto bfloat16 = cast_all<uint16_t>(DType::kFloat32, wide, DType::kBFloat16);
  const auto half = cast_all<uint16_t>(DType::kFloat32, wide, DType::kFloat16);
  for (size_t i = 0; i < wide.size(); ++i) {
    ASSERT_EQ(bfloat16[i], bfloat16_from_float(from_bits(wide[i]))) << std::hex << wide[i];
    ASSERT_EQ(half[i], half_from_float(from_bits(wide[i]))) << std::hex << wide[i];
  }
}

TEST(Cast, WholeBuffersWidenLikeOneElement) {
  std::vector<uint16_t> narrow(0x10000);
  for (size_t i = 0; i < narrow.size(); ++i) narrow[i] = static_cast<uint16_t>(i);
  const auto bfloat16 = cast_all<uint32_t>(DType::kBFloat16, narrow, DType::kFloat32);
  const auto half = cast_all<uint32_t>(DType::kFloat16, narrow, DType::kFloat32);
  for (size_t i = 0; i < narrow.size(); ++i) {
    ASSERT_EQ(bfloat16[i], bits_of(float_from_bfloat16(narrow[i]))) << i;
    ASSERT_EQ(half[i], bits_of(float_from_half(narrow[i]))) << i;
  }
}

TEST(Cast, IntegersBecomeTheNearestFloatTiesToEven) {
  const std::vector<int64_t> integers = {0,
                                         1,
                                         -1,
                                         16777216,
                                         16777217,
                                         16777219,
                                         -16777217,
                                         std::numeric_limits<int64_t>::max(),
                                         std::numeric_limits<int64_t>::min()};
  const std::vector<float> expected = {0,
                                       1,
                                       -1,
                                       16777216.0f,
                                       16777216.0f,
                                       16777220.0f,
                                       -16777216.0f,
                                       9223372036854775808.0f,
                                       -9223372036854775808.0f};
  EXPECT_EQ(cast_all<float>(DType::kInt64, integers, DType::kFloat32), expected);
}

TEST(Cast, SmallIntegersKeepTheirSigns) {
  const std::vector<float> expected = {-128, -1, 0, 127};
  EXPECT_EQ(cast_all<float>(DType::kInt8, std::vector<int8_t>{-128, -1, 0, 127}, DType::kFloat32),
            expected);
  EXPECT_EQ(cast_all<float>(DType::kInt16, std::vector<int16_t>{-128, -1, 0, 127}, DType::kFloat32),
            expected);
  EXPECT_EQ(cast_all<float>(DType::kInt32, std::vector<int32_t>{-128, -1, 0, 127}, DType::kFloat32),
            expected);
  EXPECT_EQ(cast_all<float>(DType::kUInt8, std::vector<uint8_t>{128, 255}, DType::kFloat32),
            (std::vector<float>{128, 255}));
}

TEST(Cast, EveryNonZeroBoolIsOne) {
  EXPECT_EQ(cast_all<float>(DType::kBool, std::vector<uint8_t>{0, 1, 2, 255}, DType::kFloat32),
            (std::vector<float>{0, 1, 1, 1}));
}

TEST(Cast, FloatsNarrowAsTheirScalarFunctionsDo) {
  const std::vector<float> values = {1.0f, -0.0f, 3.14159265f, 65520.0f, 1e-8f, -2.5f};
  const auto brain = cast_all<uint16_t>(DType::kFloat32, values, DType::kBFloat16);
  const auto half = cast_all<uint16_t>(DType::kFloat32, values, DType::kFloat16);
  for (size_t i = 0; i < values.size(); ++i) {
    EXPECT_EQ(brain[i], bfloat16_from_float(values[i]));
    EXPECT_EQ(half[i], half_from_float(values[i]));
  }
}

// torch converts a double to float first as well (c10::Half and c10::BFloat16 are made from float).
TEST(Cast, DoublesGoThroughFloat) {
  const std::vector<double> values = {1.0 + std::ldexp(1.0, -11) + std::ldexp(1.0, -40)};
  EXPECT_EQ(cast_all<uint16_t>(DType::kFloat64, values, DType::kFloat16),
            (std::vector<uint16_t>{0x3C00}));
}

TEST(Cast, HalfBecomesBFloat16AndBackByWayOfFloat) {
  const std::vector<uint16_t> half = {0x3C00, 0x3555, 0xC000};
  EXPECT_EQ(cast_all<uint16_t>(DType::kFloat16, half, DType::kBFloat16),
            (std::vector<uint16_t>{0x3F80, bfloat16_from_float(float_from_half(0x3555)), 0xC000}));
  EXPECT_EQ(cast_all<uint16_t>(DType::kBFloat16, std::vector<uint16_t>{0x3F80}, DType::kFloat16),
            (std::vector<uint16_t>{0x3C00}));
}

TEST(Cast, EqualTypesAreCopiedBitForBit) {
  const std::vector<uint32_t> patterns = {0x7F800001, 0xFFC12345, 0x80000000};
  EXPECT_EQ(cast_all<uint32_t>(DType::kFloat32, patterns, DType::kFloat32), patterns);
  EXPECT_EQ(cast_all<uint32_t>(DType::kUInt32, patterns, DType::kUInt32), patterns);
}

TEST(Cast, OnlyFloatingTargetsAndOrdinarySourcesAreKnown) {
  EXPECT_TRUE(can_cast(DType::kBool, DType::kFloat32));
  EXPECT_TRUE(can_cast(DType::kFloat64, DType::kBFloat16));
  EXPECT_TRUE(can_cast(DType::kComplex64, DType::kComplex64));
  EXPECT_FALSE(can_cast(DType::kFloat32, DType::kInt64));
  EXPECT_FALSE(can_cast(DType::kFloat32, DType::kFloat64));
  EXPECT_FALSE(can_cast(DType::kComplex64, DType::kFloat32));
  EXPECT_FALSE(can_cast(DType::kFloat8E5M2, DType::kFloat32));
}

TEST(Cast, AnUnknownPairOrAWrongSizeIsOurBug) {
  std::vector<std::byte> source(8), target(8);
  EXPECT_THROW(cast(DType::kFloat32, source, DType::kInt32, target), CheckFailure);
  EXPECT_THROW(cast(DType::kFloat32, source, DType::kBFloat16, target), CheckFailure);
}

TEST(Cast, NothingBecomesNothing) {
  cast(DType::kFloat32, {}, DType::kBFloat16, {});
  cast(DType::kFloat32, {}, DType::kFloat32, {});
}

}  // namespace
}  // namespace isoshard
