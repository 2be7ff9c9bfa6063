// Facts about the fast CRCs: they are the published ones, and pieces join as core/polynomial.h
// says.
#include "checkpoint/format/crc.h"

#include <gtest/gtest.h>

#include "core/polynomial.h"
#include "core/random.h"

namespace isoshard::checkpoint {
namespace {

std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text));
}

std::string random_text(Random* random, int64_t size) {
  std::string text(static_cast<size_t>(size), '\0');
  for (char& byte : text) byte = static_cast<char>(random->next());
  return text;
}

TEST(Crc, CheckValuesOfTheNineDigitsAreThePublishedOnes) {
  RawCrcs crcs;
  crcs.update(bytes_of("123456789"));
  EXPECT_EQ(crc32_of(bytes_of("123456789")), 0xCBF43926u);
  EXPECT_EQ(crc32_polynomial().finish(crcs.crc32, 9), 0xCBF43926u);
  EXPECT_EQ(hex16(crc64_ecma_polynomial().finish(crcs.ecma, 9)), "995dc9bbdf1939fa");
  EXPECT_EQ(hex16(crc64_jones_polynomial().finish(crcs.jones, 9)), "3558e8e979f60d7e");
}

TEST(Crc, TheEmptyMessageHasCrcZeroAndLeavesTheRegistersAlone) {
  EXPECT_EQ(crc32_of({}), 0u);
  RawCrcs crcs{1, 2, 3};
  crcs.update({});
  EXPECT_EQ(crcs.crc32, 1u);
  EXPECT_EQ(crcs.ecma, 2u);
  EXPECT_EQ(crcs.jones, 3u);
}

TEST(Crc, RegistersStayZeroOverZeros) {
  RawCrcs crcs;
  crcs.update(bytes_of(std::string(100000, '\0')));
  EXPECT_EQ(crcs.crc32, 0u);
  EXPECT_EQ(crcs.ecma, 0u);
  EXPECT_EQ(crcs.jones, 0u);
}

// Lengths around the block sizes of the vector code, at every alignment.
TEST(Crc, OnePassEqualsAnyTwoPasses) {
  Random random(1);
  const std::string text = random_text(&random, 2000);
  for (size_t begin = 0; begin < 16; ++begin) {
    for (size_t size :
         {1u, 7u, 15u, 16u, 17u, 63u, 64u, 65u, 127u, 128u, 255u, 256u, 257u, 1024u}) {
      const auto bytes = bytes_of(text).subspan(begin, size);
      RawCrcs whole, parts;
      whole.update(bytes);
      const auto cut = static_cast<size_t>(random.between(0, static_cast<int64_t>(size)));
      parts.update(bytes.first(cut));
      parts.update(bytes.subspan(cut));
      ASSERT_EQ(whole.crc32, parts.crc32) << size;
      ASSERT_EQ(whole.ecma, parts.ecma) << size;
      ASSERT_EQ(whole.jones, parts.jones) << size;
      ASSERT_EQ(crc32_polynomial().finish(whole.crc32, static_cast<int64_t>(size)),
                crc32_of(bytes));
    }
  }
}

TEST(Crc, ShiftedPiecesSumToTheWhole) {
  Random random(2);
  const std::string text = random_text(&random, 5000);
  RawCrcs whole, first, second;
  whole.update(bytes_of(text));
  first.update(bytes_of(text).first(1234));
  second.update(bytes_of(text).subspan(1234));
  const int64_t after = 5000 - 1234;
  EXPECT_EQ(crc32_polynomial().shift(first.crc32, after) ^ second.crc32, whole.crc32);
  EXPECT_EQ(crc64_ecma_polynomial().shift(first.ecma, after) ^ second.ecma, whole.ecma);
  EXPECT_EQ(crc64_jones_polynomial().shift(first.jones, after) ^ second.jones, whole.jones);
}

TEST(Hash, Sha256OfKnownTextsIsThePublishedOne) {
  EXPECT_EQ(sha256_hex(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sha256_hex("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

TEST(Hash, HexHasSixteenLowerCaseDigits) {
  EXPECT_EQ(hex16(0), "0000000000000000");
  EXPECT_EQ(hex16(0xABCDEFull), "0000000000abcdef");
  EXPECT_EQ(hex16(~0ull), "ffffffffffffffff");
}

}  // namespace
}  // namespace isoshard::checkpoint
