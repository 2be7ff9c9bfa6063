// Facts about CRC combination, against a bitwise CRC that shares nothing with the code under test.
#include "core/polynomial.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/random.h"

namespace isoshard {
namespace {

struct Case {
  const char* name;
  const CrcPolynomial& (*polynomial)();
  uint64_t reflected;
  int width;
  uint64_t check;  // CRC of "123456789"
};

const Case kCases[] = {
    {"crc32", crc32_polynomial, 0xEDB88320ull, 32, 0xCBF43926ull},
    {"ecma", crc64_ecma_polynomial, 0xC96C5795D7870F42ull, 64, 0x995DC9BBDF1939FAull},
    {"jones", crc64_jones_polynomial, 0x95AC9329AC4BC9B5ull, 64, 0x3558E8E979F60D7Eull},
};

uint64_t mask_of(const Case& c) { return c.width == 64 ? ~0ull : (1ull << c.width) - 1; }

// The register after `text`, one bit at a time; nothing is inverted.
uint64_t bitwise(const Case& c, uint64_t value, const std::string& text) {
  for (char byte : text) {
    value ^= static_cast<unsigned char>(byte);
    for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ (value & 1 ? c.reflected : 0);
  }
  return value;
}

uint64_t raw(const Case& c, const std::string& text) { return bitwise(c, 0, text); }

uint64_t ordinary(const Case& c, const std::string& text) {
  return bitwise(c, mask_of(c), text) ^ mask_of(c);
}

class Crc : public testing::TestWithParam<Case> {};

INSTANTIATE_TEST_SUITE_P(All, Crc, testing::ValuesIn(kCases),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(Crc, CheckValueOfTheNineDigitsIsThePublishedOne) {
  const Case& c = GetParam();
  EXPECT_EQ(ordinary(c, "123456789"), c.check);
  EXPECT_EQ(c.polynomial().finish(raw(c, "123456789"), 9), c.check);
}

TEST_P(Crc, TheEmptyMessageHasCrcZero) { EXPECT_EQ(GetParam().polynomial().finish(0, 0), 0u); }

TEST_P(Crc, ShiftingEqualsFeedingZeroBytes) {
  const Case& c = GetParam();
  Random random(1);
  for (int bytes = 0; bytes < 300; ++bytes) {
    const uint64_t value = random.next() & mask_of(c);
    const std::string zeros(static_cast<size_t>(bytes), '\0');
    ASSERT_EQ(c.polynomial().shift(value, bytes), bitwise(c, value, zeros)) << bytes;
  }
}

TEST_P(Crc, PiecesCombineInAnyOrder) {
  const Case& c = GetParam();
  Random random(2);
  for (int round = 0; round < 200; ++round) {
    std::string text(static_cast<size_t>(random.between(0, 400)), '\0');
    for (char& byte : text) byte = static_cast<char>(random.next());
    std::vector<size_t> cuts = {0, text.size()};
    for (int64_t i = random.below(8); i > 0; --i) {
      cuts.push_back(static_cast<size_t>(random.between(0, static_cast<int64_t>(text.size()))));
    }
    std::sort(cuts.begin(), cuts.end());
    std::vector<size_t> order(cuts.size() - 1);
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    for (size_t i = order.size(); i > 1; --i) {
      std::swap(order[i - 1], order[static_cast<size_t>(random.below(static_cast<int64_t>(i)))]);
    }
    uint64_t sum = 0;
    for (size_t piece : order) {
      const std::string part = text.substr(cuts[piece], cuts[piece + 1] - cuts[piece]);
      sum ^=
          c.polynomial().shift(raw(c, part), static_cast<int64_t>(text.size() - cuts[piece + 1]));
    }
    const auto bytes = static_cast<int64_t>(text.size());
    ASSERT_EQ(c.polynomial().finish(sum, bytes), ordinary(c, text)) << "round " << round;
  }
}

// Laws that reach lengths no message of a test has: shift(a + b) = shift(a) then shift(b), and the
// shift is linear.
TEST_P(Crc, ShiftsAddUpToLengthsOfTwoToThe62) {
  const Case& c = GetParam();
  const CrcPolynomial& p = c.polynomial();
  Random random(3);
  for (int round = 0; round < 300; ++round) {
    const int64_t limit = int64_t{1} << random.between(0, 61);
    const int64_t a = random.between(0, limit), b = random.between(0, limit);
    const uint64_t x = random.next() & mask_of(c), y = random.next() & mask_of(c);
    ASSERT_EQ(p.shift(p.shift(x, a), b), p.shift(x, a + b)) << a << " " << b;
    ASSERT_EQ(p.shift(x ^ y, a), p.shift(x, a) ^ p.shift(y, a)) << a;
  }
}

// The doubling ladder ends in 2^40 and begins where feeding bytes is still possible.
TEST_P(Crc, AShiftOf2To40IsFortyDoublingsOfOneByte) {
  const Case& c = GetParam();
  const CrcPolynomial& p = c.polynomial();
  const uint64_t start = 0x123456789ABCDEFull & mask_of(c);
  uint64_t value = bitwise(c, start, std::string(1 << 16, '\0'));
  for (int k = 16; k < 40; ++k) value = p.shift(value, int64_t{1} << k);
  EXPECT_EQ(value, p.shift(start, int64_t{1} << 40));
}

TEST_P(Crc, NothingMovesAZeroRegister) {
  EXPECT_EQ(GetParam().polynomial().shift(0, int64_t{1} << 62), 0u);
}

TEST_P(Crc, ANegativeLengthIsOurBug) {
  EXPECT_THROW(GetParam().polynomial().shift(1, -1), CheckFailure);
}

// The length counts even where every byte is zero.
TEST_P(Crc, ZerosOfDifferentLengthsHaveDifferentCrcs) {
  const Case& c = GetParam();
  EXPECT_EQ(c.polynomial().finish(0, 5), ordinary(c, std::string(5, '\0')));
  EXPECT_NE(c.polynomial().finish(0, 5), c.polynomial().finish(0, 6));
}

}  // namespace
}  // namespace isoshard
