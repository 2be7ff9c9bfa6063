// What a message looks like, and what it may not show.
#include "core/error.h"

#include <gtest/gtest.h>

namespace isoshard {
namespace {

TEST(Error, PartsThatAreThereStandOnLinesOfTheirOwn) {
  const Error error(ErrorInfo{.code = ErrorCode::kCorrupt,
                              .what = "What.",
                              .file = "a",
                              .expected = "1",
                              .found = "2",
                              .safe = "all",
                              .next = "look"});
  EXPECT_STREQ(error.what(),
               "What.\n  file:     a\n  expected: 1\n  found:    2\n  safe now: all\n"
               "  next:     look");
}

TEST(Error, WhatIsSafeIsSaidAlways) {
  const Error error(ErrorCode::kUsage, "What.");
  EXPECT_NE(std::string(error.what()).find(kNothingPublished), std::string::npos);
}

TEST(Error, QuotedTextsShowNoControlCharacters) {
  EXPECT_EQ(quote("plain \xC3\xA4"), "\"plain \xC3\xA4\"");
  EXPECT_EQ(quote("a\x1B[31m\n"), "\"a\\u{1b}[31m\\u{a}\"");
  EXPECT_EQ(quote("\xE2\x80\xAE"), "\"\\u{202e}\"");  // text that runs backwards
  EXPECT_EQ(quote("\xFF"), "\"\\x{ff}\"");
}

TEST(Error, QuotedTextsEndWhereTheyEnd) {
  EXPECT_EQ(quote("a\" b\\"), "\"a\\\" b\\\\\"");
  EXPECT_EQ(quote(""), "\"\"");
}

}  // namespace
}  // namespace isoshard
