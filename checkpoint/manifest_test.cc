// A manifest is read only in the very bytes in which it was written.
#include "checkpoint/manifest.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <cstdlib>
#include <fstream>
#include <new>
#include <string>

#include "core/check.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

Manifest example() {
  return Manifest{.files = {{"a/x.pt", 4096, "crc64x2:00112233445566778899aabbccddeeff"},
                            {"b \"\xC3\xA4\".pt", 0, "sha256:00"}},
                  .program_version = "0.1.0"};
}

ErrorInfo refusal_of(const std::string& text) {
  try {
    parse_manifest(text, "dir/MANIFEST.json");
  } catch (const Error& error) {
    EXPECT_EQ(error.info().code, ErrorCode::kCorrupt);
    EXPECT_EQ(error.info().file, "dir/MANIFEST.json");
    return error.info();
  }
  ADD_FAILURE() << "taken: " << text;
  return {};
}

std::string with(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

// The text with its self hash made right again, so that the rule under test is what refuses it:
// the hash that the parser expected is in its message.
std::string resealed(const std::string& text) {
  const size_t at = text.find("sha256:", text.find("\"self_hash\""));
  return std::string(text).replace(at, 71, refusal_of(text).expected);
}

TEST(Manifest, WhatIsWrittenIsRead) {
  EXPECT_EQ(parse_manifest(to_json(example()), "m"), example());
  EXPECT_EQ(parse_manifest(to_json(Manifest{}), "m"), Manifest{});
}

TEST(Manifest, TheTextIsCanonical) {
  Manifest swapped = example();
  std::swap(swapped.files[0], swapped.files[1]);
  EXPECT_EQ(to_json(swapped), to_json(example()));
  const std::string text =
      to_json(Manifest{.files = {{"f", 1, "crc64x2:ab"}}, .program_version = "1"});
  const std::string head =
      "{\n \"files\": [\n  {\n   \"hash\": \"crc64x2:ab\",\n   \"path\": \"f\",\n"
      "   \"size_bytes\": 1\n  }\n ],\n \"kind\": \"isoshard-manifest\",\n"
      " \"program_version\": \"1\",\n \"schema\": 1,\n \"self_hash\": \"sha256:";
  EXPECT_EQ(text.substr(0, head.size()), head);
  EXPECT_EQ(text.substr(head.size() + 64), "\"\n}\n");
}

TEST(Manifest, EveryChangedByteIsNoticed) {
  const std::string text = to_json(example());
  for (size_t at = 0; at < text.size(); ++at) {
    for (const int flip : {1, 2, 4, 8, 16, 32, 64, 128, 255}) {
      std::string damaged = text;
      damaged[at] = static_cast<char>(damaged[at] ^ flip);
      EXPECT_THROW(parse_manifest(damaged, "m"), Error) << at << " " << flip;
    }
  }
}

TEST(Manifest, EveryTruncationAndExtensionIsNoticed) {
  const std::string text = to_json(example());
  for (size_t length = 0; length < text.size(); ++length) {
    EXPECT_THROW(parse_manifest(text.substr(0, length), "m"), Error) << length;
  }
  for (const char* more : {"\n", " ", "x"}) EXPECT_THROW(parse_manifest(text + more, "m"), Error);
  EXPECT_THROW(parse_manifest("\xEF\xBB\xBF" + text, "m"), Error);
}

TEST(Manifest, AWrongSelfHashIsNamed) {
  const ErrorInfo info = refusal_of(with(to_json(example()), "4096", "4097"));
  EXPECT_EQ(info.entry, "self_hash");
  EXPECT_NE(info.what.find("changed or damaged"), std::string::npos);
}

TEST(Manifest, ADuplicateKeyIsRefused) {
  const ErrorInfo info =
      refusal_of(with(to_json(example()), " \"kind\"", " \"schema\": 1,\n \"kind\""));
  EXPECT_NE(info.what.find("twice"), std::string::npos);
  EXPECT_EQ(info.entry, "\"schema\"");
  EXPECT_EQ(refusal_of(with(to_json(example()), "\"size_bytes\"", "\"path\": \"\", \"size_bytes\""))
                .entry,
            "\"path\"");
}

TEST(Manifest, AnUnknownSchemaOrKindIsRefused) {
  EXPECT_EQ(refusal_of(with(to_json(example()), "\"schema\": 1", "\"schema\": 2")).found, "2");
  EXPECT_EQ(refusal_of(with(to_json(example()), "isoshard-man", "other-man")).entry, "kind");
}

TEST(Manifest, AnUnsafePathIsRefusedByName) {
  for (const char* path : {"../x", "/x", "", "a//b", "a/./b", "\\u0000", "\\u001b[2J"}) {
    const std::string text = with(to_json(example()), "\"a/x.pt\"", '"' + std::string(path) + '"');
    const ErrorInfo info = refusal_of(resealed(text));
    EXPECT_NE(info.what.find("not safe"), std::string::npos) << path;
    EXPECT_EQ(info.entry.substr(0, 9), "files[0] ");
    EXPECT_EQ(info.entry.find('\x1b'), std::string::npos);
  }
}

TEST(Manifest, MalformedEntriesAreRefused) {
  const std::string text = to_json(example());
  for (const char* size : {"-1", "1.0", "9223372036854775808", "1e3", "\"1\"", "null"}) {
    EXPECT_EQ(refusal_of(resealed(with(text, "4096", size))).entry, "files[0] \"a/x.pt\"") << size;
  }
  for (const char* hash : {"", "crc", ":00", "crc:", "crc:0G", "CRC:00"}) {
    EXPECT_NE(refusal_of(resealed(with(text, "sha256:00", hash))).what.find("malformed"),
              std::string::npos);
  }
  EXPECT_NE(refusal_of(resealed(with(text, "a/x.pt", "c"))).what.find("not sorted"),
            std::string::npos);
  const std::string unknown = with(text, "\"size_bytes\"", "\"q\": 1,\n   \"size_bytes\"");
  EXPECT_NE(refusal_of(resealed(unknown)).what.find("not in the form"), std::string::npos);
}

TEST(Manifest, DeepNestingEndsEarly) {
  EXPECT_NE(refusal_of(std::string(60000, '[')).what.find("deeper"), std::string::npos);
}

TEST(Manifest, ATextOfManyKilobytesIsRefusedBeforeItIsKept) {
  for (const std::string& token : {'"' + std::string(100'000, 'x') + '"', std::string(100'000, '1'),
                                   '"' + std::string(100'000, '\\') + '"'}) {
    const std::string text = with(to_json(example()), "\"0.1.0\"", token);
    EXPECT_NE(refusal_of(text).what.find("more than 65536 bytes"), std::string::npos);
  }
}

TEST(Manifest, MoreThanIsEverWrittenIsNotRead) {
  try {
    parse_manifest(std::string(kLargestManifestBytes + 1, ' '), "m");
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_EQ(error.info().code, ErrorCode::kLimit);
  }
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)

// Ends with 0 where the text is read, or refused, within twice its length of further memory.
void read_within_bounds(const std::string& text) {
  const auto pages = [] {
    std::ifstream file("/proc/self/statm");
    int64_t count = 0;
    file >> count;
    return count;
  };
  const rlim_t most = static_cast<rlim_t>(pages() * 4096) + 2 * text.size() + (8 << 20);
  const rlimit limit{most, most};
  if (setrlimit(RLIMIT_AS, &limit) != 0) std::_Exit(3);
  try {
    parse_manifest(text, "m");
  } catch (const Error&) {
  } catch (const std::bad_alloc&) {
    std::_Exit(2);
  }
  std::_Exit(0);
}

std::string repeated(const std::string& begin, const std::string& piece, size_t count,
                     const std::string& end) {
  std::string text = begin;
  text.reserve(begin.size() + piece.size() * count + end.size());
  for (size_t i = 0; i < count; ++i) text += piece;
  return text + end;
}

TEST(ManifestMemory, IsInProportionToTheText) {
  const std::string head = "{\"files\":[";
  EXPECT_EXIT(read_within_bounds(repeated(head, "{},", 5'000'000, "{}]}")),
              testing::ExitedWithCode(0), "");
  EXPECT_EXIT(read_within_bounds(repeated(head, "0,", 8'000'000, "0]}")),
              testing::ExitedWithCode(0), "");
  EXPECT_EXIT(read_within_bounds(repeated("{", "\"a\":0,", 2'500'000, "\"b\":0}")),
              testing::ExitedWithCode(0), "");
  EXPECT_EXIT(read_within_bounds('"' + std::string(16 << 20, 'x') + '"'),
              testing::ExitedWithCode(0), "");
}

TEST(ManifestMemory, OfManyFilesIsInProportionToo) {
  Manifest large;
  for (int i = 0; i < 200'000; ++i) {
    const std::string number = std::to_string(1'000'000 + i);
    large.files.push_back({"a" + number, 0, "a:0"});
  }
  const std::string text = to_json(large);
  EXPECT_EXIT(read_within_bounds(text), testing::ExitedWithCode(0), "");
  EXPECT_EQ(parse_manifest(text, "m"), large);
}

#endif

TEST(Manifest, OurOwnMistakesAreChecked) {
  Manifest twice = example();
  twice.files.push_back(twice.files[0]);
  EXPECT_THROW(to_json(twice), CheckFailure);
  EXPECT_THROW(to_json(Manifest{.files = {{"../x", 0, "a:0"}}, .program_version = ""}),
               CheckFailure);
}

}  // namespace
}  // namespace isoshard::checkpoint
