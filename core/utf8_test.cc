// Facts about UTF-8 and about which names are safe.
#include "core/utf8.h"

#include <gtest/gtest.h>

#include <string>

namespace isoshard {
namespace {

std::string encode(uint32_t value) {
  const auto byte = [](uint32_t bits) { return static_cast<char>(bits); };
  if (value < 0x80) return {byte(value)};
  if (value < 0x800) return {byte(0xC0 | value >> 6), byte(0x80 | (value & 0x3F))};
  if (value < 0x10000) {
    return {byte(0xE0 | value >> 12), byte(0x80 | (value >> 6 & 0x3F)),
            byte(0x80 | (value & 0x3F))};
  }
  return {byte(0xF0 | value >> 18), byte(0x80 | (value >> 12 & 0x3F)),
          byte(0x80 | (value >> 6 & 0x3F)), byte(0x80 | (value & 0x3F))};
}

TEST(Utf8, EveryScalarValueIsReadBackFromItsEncoding) {
  for (uint32_t value = 0; value <= 0x10FFFF; ++value) {
    if (value >= 0xD800 && value <= 0xDFFF) continue;
    const std::string text = encode(value);
    const CodePoint point = decode_utf8(text, 0);
    ASSERT_TRUE(point.valid) << value;
    ASSERT_EQ(point.value, value);
    ASSERT_EQ(point.length, text.size()) << value;
  }
}

TEST(Utf8, SurrogatesAreNotValid) {
  for (uint32_t value = 0xD800; value <= 0xDFFF; ++value) {
    const CodePoint point = decode_utf8(encode(value), 0);
    ASSERT_FALSE(point.valid) << value;
    ASSERT_EQ(point.length, 1u);
  }
}

TEST(Utf8, OverlongFormsAndValuesBeyondUnicodeAreNotValid) {
  for (const char* text :
       {"\xC0\x80", "\xC1\xBF", "\xE0\x80\x80", "\xE0\x9F\xBF", "\xF0\x80\x80\x80",
        "\xF0\x8F\xBF\xBF", "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xFF"}) {
    EXPECT_FALSE(decode_utf8(text, 0).valid) << text;
  }
}

TEST(Utf8, EveryTruncationOfASequenceIsNotValidAndConsumesOneByte) {
  for (uint32_t value : {0x80u, 0x7FFu, 0x800u, 0xFFFDu, 0x10000u, 0x10FFFFu}) {
    const std::string text = encode(value);
    for (size_t size = 1; size < text.size(); ++size) {
      const CodePoint point = decode_utf8(text.substr(0, size), 0);
      EXPECT_FALSE(point.valid) << value << " cut to " << size;
      EXPECT_EQ(point.length, 1u);
    }
  }
}

TEST(Utf8, AStrayContinuationByteIsNotValid) {
  for (int byte = 0x80; byte < 0xC0; ++byte) {
    EXPECT_FALSE(decode_utf8(std::string(1, static_cast<char>(byte)), 0).valid) << byte;
  }
}

TEST(Utf8, DecodingBeginsInTheMiddleOfAText) {
  const std::string text = "a\xC3\xA9z";
  EXPECT_EQ(decode_utf8(text, 1).value, 0xE9u);
  EXPECT_FALSE(decode_utf8(text, 2).valid);
  EXPECT_EQ(decode_utf8(text, 3).value, static_cast<uint32_t>('z'));
}

TEST(Utf8, ControlAndBidirectionalMarksAreNotPrintable) {
  for (uint32_t value : {0x0u, 0x9u, 0xAu, 0x1Bu, 0x1Fu, 0x7Fu, 0x80u, 0x9Fu, 0xADu, 0x200Bu,
                         0x200Fu, 0x2028u, 0x202Eu, 0x2066u, 0x2069u, 0xFEFFu, 0xFFF9u, 0xE0001u}) {
    EXPECT_FALSE(is_printable(value)) << std::hex << value;
  }
  for (uint32_t value : {0x20u, 0x7Eu, 0xA0u, 0xE9u, 0x3B1u, 0x4E2Du, 0x1F600u}) {
    EXPECT_TRUE(is_printable(value)) << std::hex << value;
  }
}

TEST(Name, OrdinaryNamesAreSafe) {
  for (const char* name : {"a", "module.0.weight", "global_step3", "a/b/c", "...", "..a", "a..",
                           ".a", "-x", "a b", "\xCE\xB1", "C:", "~"}) {
    EXPECT_EQ(why_unsafe_name(name), "") << name;
  }
}

TEST(Name, PathsThatLeaveTheirFolderAreNotSafe) {
  for (const char* name : {"/", "/etc/passwd", "..", ".", "../a", "a/..", "a/../b", "a/./b", "./a",
                           "a//b", "a/", "//"}) {
    EXPECT_NE(why_unsafe_name(name), "") << name;
  }
}

TEST(Name, EmptyNamesControlCharactersAndBadUtf8AreNotSafe) {
  EXPECT_EQ(why_unsafe_name(""), "the name is empty");
  EXPECT_EQ(why_unsafe_name(std::string("a\0b", 3)), "the name has a control character");
  EXPECT_EQ(why_unsafe_name("a\nb"), "the name has a control character");
  EXPECT_EQ(why_unsafe_name("a\x7F"), "the name has a control character");
  EXPECT_EQ(why_unsafe_name("a\xC2\x85"), "the name has a control character");
  EXPECT_EQ(why_unsafe_name("a\xFF"), "the name is not valid UTF-8");
  EXPECT_EQ(why_unsafe_name("\xC0\xAE\xC0\xAE/a"), "the name is not valid UTF-8");
}

TEST(Name, LimitsOfLengthAre255BytesAComponentAnd4096InAll) {
  EXPECT_EQ(why_unsafe_name(std::string(255, 'a')), "");
  EXPECT_NE(why_unsafe_name(std::string(256, 'a')), "");
  EXPECT_NE(why_unsafe_name("b/" + std::string(256, 'a') + "/c"), "");
  std::string longest;
  for (int i = 0; i < 2048; ++i) longest += "a/";
  longest.back() = 'a';
  EXPECT_EQ(longest.size(), 4096u);
  EXPECT_EQ(why_unsafe_name(longest), "");
  EXPECT_NE(why_unsafe_name(longest + "a"), "");
}

}  // namespace
}  // namespace isoshard
