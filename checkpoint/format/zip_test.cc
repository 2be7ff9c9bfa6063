// Facts about the zip container: the bytes of headers as torch writes them, and the strict reader.
#include "checkpoint/format/zip.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>

#include "checkpoint/format/crc.h"
#include "checkpoint/memory_storage.h"
#include "checkpoint/posix_storage.h"
#include "core/error.h"
#include "core/polynomial.h"

namespace isoshard::checkpoint {
namespace {

using namespace std::string_literals;

constexpr int64_t kMax32 = 0xFFFFFFFF;

std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text));
}

std::string little(uint64_t value, int bytes) {
  std::string text;
  for (int i = 0; i < bytes; ++i, value >>= 8) text += static_cast<char>(value & 0xFF);
  return text;
}

struct Payload {
  std::string name, bytes;
};

// The whole file of a few small records.
std::string assemble(const std::vector<Payload>& payloads) {
  ZipLayout layout;
  std::string file;
  std::vector<uint32_t> crcs;
  for (const Payload& payload : payloads) {
    const int number = layout.add(payload.name, static_cast<int64_t>(payload.bytes.size()));
    crcs.push_back(crc32_of(bytes_of(payload.bytes)));
    file += layout.header(number) + payload.bytes + layout.descriptor(number, crcs.back());
  }
  return file + layout.directory(crcs);
}

ZipIndex index_of(const std::string& bytes) {
  MemoryStorage storage;
  const auto file = storage.create("/f");
  file->write_at(0, bytes_of(bytes));
  return read_zip_index(*storage.open_read("/f"));
}

ErrorInfo refusal(const std::string& bytes) {
  try {
    index_of(bytes);
  } catch (const Error& error) {
    return error.info();
  }
  ADD_FAILURE() << "accepted";
  return {};
}

// A file with an ordinary, an empty and a 64-byte record.
std::vector<Payload> three() {
  return {{"a/data.pkl", "\x80\x02}."}, {"a/data/0", ""}, {"a/data/1", std::string(64, 'x')}};
}

// ---- the writer ---------------------------------------------------------------------------------

TEST(ZipLayout, TheExampleOfTheSpecificationHasItsOffsets) {
  ZipLayout layout;
  layout.add("mp_rank_00_model_states/data.pkl", 1880);
  layout.add("mp_rank_00_model_states/.format_version", 1);
  EXPECT_EQ(layout.record(0).header_offset, 0);
  EXPECT_EQ(layout.header(0).size(), 30u + 32 + 66);
  EXPECT_EQ(layout.record(0).data_offset, 128);
  EXPECT_EQ(layout.record(1).header_offset, 2024);
}

TEST(ZipLayout, HeaderOfAnOrdinaryRecordIsExact) {
  ZipLayout layout;
  layout.add("a/b", 5);
  const std::string fields = "PK\x03\x04"s + little(0, 2) + "\x08\x08"s + little(0, 2 + 4 + 12) +
                             little(3, 2) + little(31, 2) + "a/b" + "FB" + little(27, 2);
  EXPECT_EQ(layout.header(0), fields + std::string(27, 'Z'));
  EXPECT_EQ(layout.record(0).data_offset, 64);
}

TEST(ZipLayout, DescriptorOfAnOrdinaryRecordIsExact) {
  ZipLayout layout;
  layout.add("a/b", 5);
  EXPECT_EQ(layout.descriptor(0, 0xCBF43926),
            "PK\x07\x08"s + little(0xCBF43926, 4) + little(5, 4) + little(5, 4));
}

TEST(ZipLayout, AnEmptyRecordHasNoDescriptorAndSaysSo) {
  ZipLayout layout;
  layout.add("a/b", 0);
  EXPECT_EQ(layout.descriptor(0, 0), "");
  EXPECT_EQ(layout.header(0).substr(6, 2), "\x00\x08"s);
  EXPECT_EQ(layout.directory({0}).substr(8, 2), "\x00\x08"s);
  EXPECT_EQ(layout.directory_offset(), 64);
}

TEST(ZipLayout, DirectoryOfAnOrdinaryRecordIsExact) {
  ZipLayout layout;
  layout.add("a/b", 5);
  const std::string record = "PK\x01\x02"s + little(0, 4) + "\x08\x08"s + little(0, 6) +
                             little(0x12345678, 4) + little(5, 4) + little(5, 4) + little(3, 2) +
                             little(0, 2) + little(0, 10) + little(0, 4) + "a/b";
  const std::string end64 = "PK\x06\x06"s + little(44, 8) + little(0x031E, 2) + little(0x002D, 2) +
                            little(0, 8) + little(1, 8) + little(1, 8) + little(49, 8) +
                            little(85, 8);
  const std::string locator = "PK\x06\x07"s + little(0, 4) + little(85 + 49, 8) + little(1, 4);
  const std::string end = "PK\x05\x06"s + little(0, 4) + little(1, 2) + little(1, 2) +
                          little(49, 4) + little(85, 4) + little(0, 2);
  EXPECT_EQ(layout.directory_offset(), 85);
  EXPECT_EQ(layout.directory({0x12345678}), record + end64 + locator + end);
}

TEST(ZipLayout, EveryRecordIsAlignedTo64Bytes) {
  ZipLayout layout;
  for (int i = 0; i < 300; ++i) {
    layout.add("p/" + std::string(static_cast<size_t>(1 + i % 130), 'n') + std::to_string(i),
               i % 7 * 13);
  }
  layout.add("p/big", kMax32 + 77);
  for (int i = 0; i < 100; ++i) layout.add("p/x" + std::to_string(i), i);
  int64_t cursor = 0;
  for (int i = 0; i < layout.count(); ++i) {
    const ZipRecord& record = layout.record(i);
    ASSERT_EQ(record.header_offset, cursor) << i;
    ASSERT_EQ(record.data_offset % 64, 0) << i;
    ASSERT_EQ(record.data_offset, cursor + static_cast<int64_t>(layout.header(i).size())) << i;
    cursor = record.data_offset + record.size_bytes +
             static_cast<int64_t>(layout.descriptor(i, 0).size());
  }
  EXPECT_EQ(layout.directory_offset(), cursor);
}

// The table of the format beyond 4 GiB: which fields a record of `size_bytes` has whose header lies
// near `header_offset`, in three places.
struct WideRow {
  int64_t size_bytes;
  int64_t filler_bytes;  // size of the record before it; -1: there is none
  bool large, far;
};

class ZipWide : public testing::TestWithParam<WideRow> {
 protected:
  // Adds a filler so that the record under test begins exactly where the row says.
  static int add(ZipLayout* layout, const WideRow& row) {
    if (row.filler_bytes >= 0) layout->add("a/f", row.filler_bytes);
    return layout->add("a/b", row.size_bytes);
  }
};

// A filler of n bytes below 4 GiB is followed by a header at 64 + n + 16; of n from 4 GiB on, which
// has a zip64 field of 20 bytes and a wide descriptor, by one at 64 + n + 24.
constexpr int64_t kJustBelow = kMax32 - 1 - 80, kJustAt = kMax32 - 80;

INSTANTIATE_TEST_SUITE_P(
    Table, ZipWide,
    testing::Values(WideRow{1000, -1, false, false}, WideRow{kMax32 - 1, -1, false, false},
                    WideRow{kMax32, -1, true, false}, WideRow{kMax32 + 1, -1, true, false},
                    WideRow{int64_t{1} << 40, -1, true, false},
                    WideRow{1000, kJustBelow, false, false}, WideRow{1000, kJustAt, false, true},
                    WideRow{1000, kMax32 + 65, false, true},
                    WideRow{kMax32 - 1, kJustAt, false, true},
                    WideRow{kMax32, kJustBelow, true, false}, WideRow{kMax32, kJustAt, true, true},
                    WideRow{int64_t{1} << 40, int64_t{1} << 41, true, true}));

TEST_P(ZipWide, HeaderHasTheSizesThenTheOffsetThenTheFill) {
  const WideRow row = GetParam();
  ZipLayout layout;
  const int number = add(&layout, row);
  const ZipRecord& record = layout.record(number);
  EXPECT_EQ(record.header_offset >= kMax32, row.far);
  std::string wide;
  if (row.large) wide += little(static_cast<uint64_t>(row.size_bytes), 8) + little(0, 8);
  if (row.far) wide += little(static_cast<uint64_t>(record.header_offset), 8);
  if (!wide.empty()) wide = little(1, 2) + little(wide.size(), 2) + wide;
  const size_t fill =
      static_cast<size_t>(record.data_offset - record.header_offset) - 33 - wide.size() - 4;
  EXPECT_LT(fill, 64u);
  const std::string extra = wide + "FB" + little(fill, 2) + std::string(fill, 'Z');
  EXPECT_EQ(layout.header(number), "PK\x03\x04"s + little(0, 2) + "\x08\x08"s + little(0, 18) +
                                       little(3, 2) + little(extra.size(), 2) + "a/b" + extra);
}

TEST_P(ZipWide, DescriptorIsWideWhereTheHeaderHasAZip64Field) {
  const WideRow row = GetParam();
  ZipLayout layout;
  const int number = add(&layout, row);
  const int width = row.large || row.far ? 8 : 4;
  const auto size = static_cast<uint64_t>(row.size_bytes);
  EXPECT_EQ(layout.descriptor(number, 7),
            "PK\x07\x08"s + little(7, 4) + little(size, width) + little(size, width));
}

TEST_P(ZipWide, DirectoryHasOnesInTheNarrowFieldsAndTheRealNumbersInTheWideOnes) {
  const WideRow row = GetParam();
  ZipLayout layout;
  const int number = add(&layout, row);
  const ZipRecord& record = layout.record(number);
  const auto size = static_cast<uint64_t>(row.size_bytes);
  const auto offset = static_cast<uint64_t>(record.header_offset);
  std::string wide;
  if (row.large) wide += little(size, 8) + little(size, 8);
  if (row.far) wide += little(offset, 8);
  if (!wide.empty()) wide = little(1, 2) + little(wide.size(), 2) + wide;
  const std::string expected = "PK\x01\x02"s + little(0, 4) + "\x08\x08"s + little(0, 6) +
                               little(9, 4) + little(row.large ? 0xFFFFFFFF : size, 4) +
                               little(row.large ? 0xFFFFFFFF : size, 4) + little(3, 2) +
                               little(wide.size(), 2) + little(0, 10) +
                               little(row.far ? 0xFFFFFFFF : offset, 4) + "a/b" + wide;
  std::vector<uint32_t> crcs(static_cast<size_t>(number), 5);
  crcs.push_back(9);
  const std::string directory = layout.directory(crcs);
  const size_t at = directory.find("PK\x01\x02"s, number == 0 ? 0 : 1);
  EXPECT_EQ(directory.substr(at, expected.size()), expected);
}

TEST_P(ZipWide, EndRecordsHoldTheRealNumbersAndTheOldOneIsCapped) {
  ZipLayout layout;
  const int number = add(&layout, GetParam());
  const std::string directory =
      layout.directory(std::vector<uint32_t>(static_cast<size_t>(number) + 1));
  const auto offset = static_cast<uint64_t>(layout.directory_offset());
  const size_t end64 = directory.size() - 98, bytes = end64;
  EXPECT_EQ(directory.substr(end64 + 40, 16), little(bytes, 8) + little(offset, 8));
  EXPECT_EQ(directory.substr(end64 + 64, 8), little(offset + bytes, 8));
  EXPECT_EQ(directory.substr(directory.size() - 6, 4),
            little(std::min<uint64_t>(offset, 0xFFFFFFFF), 4));
}

TEST(ZipLayout, TheOldEndRecordCountsAtMost65535Records) {
  ZipLayout layout;
  for (int i = 0; i < 65536; ++i) layout.add("a/" + std::to_string(i), 0);
  const std::string directory = layout.directory(std::vector<uint32_t>(65536));
  EXPECT_EQ(directory.substr(directory.size() - 14, 4), "\xFF\xFF\xFF\xFF"s);
  EXPECT_EQ(directory.substr(directory.size() - 98 + 24, 16), little(65536, 8) + little(65536, 8));
}

// ---- the reader ---------------------------------------------------------------------------------

TEST(ZipReader, WhatTheLayoutWritesIsReadBack) {
  const std::vector<Payload> payloads = three();
  const ZipIndex index = index_of(assemble(payloads));
  EXPECT_TRUE(index.torch_dialect);
  EXPECT_EQ(index.prefix, "a");
  ASSERT_EQ(index.records.size(), 3u);
  ZipLayout layout;
  for (size_t i = 0; i < 3; ++i) {
    layout.add(payloads[i].name, static_cast<int64_t>(payloads[i].bytes.size()));
    const ZipRecord& expected = layout.record(static_cast<int>(i));
    EXPECT_EQ(index.prefix + "/" + index.records[i].name, payloads[i].name);
    EXPECT_EQ(index.records[i].header_offset, expected.header_offset);
    EXPECT_EQ(index.records[i].data_offset, expected.data_offset);
    EXPECT_EQ(index.records[i].size_bytes, expected.size_bytes);
    EXPECT_EQ(index.records[i].crc32, crc32_of(bytes_of(payloads[i].bytes)));
  }
}

TEST(ZipReader, MoreThan65535RecordsAreReadBack) {
  std::vector<Payload> payloads;
  for (int i = 0; i < 70000; ++i) payloads.push_back({"a/" + std::to_string(i), ""});
  const ZipIndex index = index_of(assemble(payloads));
  ASSERT_EQ(index.records.size(), 70000u);
  EXPECT_EQ(index.records.back().name, "69999");
}

TEST(ZipReader, EveryChangedByteOutsideThePayloadsIsNoticed) {
  const std::string good = assemble(three());
  const ZipIndex index = index_of(good);
  for (size_t at = 0; at < good.size(); ++at) {
    bool payload = false;
    for (const ZipRecord& record : index.records) {
      const auto offset = static_cast<int64_t>(at);
      payload |= offset >= record.data_offset && offset < record.data_offset + record.size_bytes;
    }
    if (payload) continue;
    for (int bit = 0; bit < 8; ++bit) {
      std::string bad = good;
      bad[at] = static_cast<char>(bad[at] ^ (1 << bit));
      EXPECT_THROW(index_of(bad), Error) << "byte " << at << ", bit " << bit;
    }
  }
}

TEST(ZipReader, EveryTruncationAndAppendedBytesAreNoticed) {
  const std::string good = assemble(three());
  for (size_t size = 0; size < good.size(); ++size) {
    const ErrorCode code = refusal(good.substr(0, size)).code;
    EXPECT_EQ(code, ErrorCode::kIncomplete) << size;
  }
  EXPECT_EQ(refusal(good + '\0').code, ErrorCode::kIncomplete);
  EXPECT_EQ(refusal(good + good).code, ErrorCode::kCorrupt);
}

TEST(ZipReader, UnsafeAndDoubleNamesAreHostile) {
  for (const std::string& name : {"/etc/passwd"s, "../a"s, "a/../b"s, "a//b"s, "a/./b"s, "a\\b/c"s,
                                  "a/\xFF"s, "a/\x1b"s, "a/b\0c"s, ""s}) {
    EXPECT_EQ(refusal(assemble({{name, "x"}})).code, ErrorCode::kHostile) << name;
  }
  EXPECT_EQ(refusal(assemble({{"a/b", "x"}, {"a/b", "x"}})).code, ErrorCode::kHostile);
}

TEST(ZipReader, AllRecordsLieInOneFolder) {
  EXPECT_EQ(refusal(assemble({{"a/b", "x"}, {"c/b", "x"}})).code, ErrorCode::kCorrupt);
  EXPECT_EQ(refusal(assemble({{"a", "x"}})).code, ErrorCode::kCorrupt);
}

TEST(ZipReader, GapsAndOverlapsAreNoticed) {
  // The directory leaves out the first of two records, so its bytes belong to nobody.
  ZipLayout layout;
  layout.add("a/b", 1);
  layout.add("a/c", 1);
  const std::string records = layout.header(0) + "x" + layout.descriptor(0, 5) + layout.header(1) +
                              "y" + layout.descriptor(1, 6);
  std::string directory = layout.directory({5, 6});
  const size_t cut = directory.find("PK\x01\x02"s, 1);
  directory.erase(0, cut);
  const size_t bytes = directory.size() - 98;
  directory.replace(bytes + 24, 16, little(1, 8) + little(1, 8));
  directory.replace(bytes + 40, 8, little(bytes, 8));
  directory.replace(bytes + 64, 8, little(records.size() + bytes, 8));
  directory.replace(directory.size() - 14, 8, little(1, 2) + little(1, 2) + little(bytes, 4));
  const ErrorInfo info = refusal(records + directory);
  EXPECT_EQ(info.code, ErrorCode::kCorrupt);
  EXPECT_EQ(info.what, "Zip records overlap or leave a gap.");
}

// Offsets and sizes of the end records are made to fit, so that nothing else is wrong.
TEST(ZipReader, BytesThatBelongToNobodyAreNoticed) {
  ZipLayout layout;
  layout.add("a/b", 1);
  const std::string records = layout.header(0) + "x" + layout.descriptor(0, 5);
  const std::string directory = layout.directory({5});
  const size_t bytes = directory.size() - 98;  // of its records
  const uint64_t at = records.size(), size = bytes;
  std::string later = directory;
  later.replace(bytes + 48, 8, little(at + 5, 8));
  later.replace(bytes + 64, 8, little(at + 5 + size, 8));
  later.replace(later.size() - 6, 4, little(at + 5, 4));
  EXPECT_EQ(refusal(records + "12345" + later).what,
            "Bytes lie between the last zip record and the directory.");
  std::string longer = directory;
  longer.replace(bytes + 40, 8, little(size + 5, 8));
  longer.replace(bytes + 64, 8, little(at + size + 5, 8));
  longer.replace(longer.size() - 10, 4, little(size + 5, 4));
  longer.insert(bytes, "12345");
  EXPECT_EQ(refusal(records + longer).what,
            "The zip directory holds bytes beyond its last record.");
}

TEST(ZipReader, BothEndRecordsCountAlike) {
  std::string file = assemble({{"a/b", "x"}});
  file.replace(file.size() - 14, 4, little(2, 2) + little(2, 2));
  EXPECT_EQ(refusal(file).what, "A zip header field is wrong: number of records.");
}

// What Python's zipfile makes of two stored records, archive/data.pkl and archive/version.
std::string from_hex(const std::string& hex) {
  std::string bytes;
  for (size_t i = 0; i < hex.size(); i += 2) {
    bytes += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  }
  return bytes;
}

const char* const kPythonZip =
    "504b0304140000000000831822503db7de89040000000400000010000000617263686976652f646174612e706b6c"
    "80027d2e504b030414000000000083182250d19e675502000000020000000f000000617263686976652f76657273"
    "696f6e330a504b01021403140000000000831822503db7de89040000000400000010000000000000000000000080"
    "0100000000617263686976652f646174612e706b6c504b0102140314000000000083182250d19e67550200000002"
    "0000000f0000000000000000000000800132000000617263686976652f76657273696f6e504b0506000000000200"
    "02007b000000610000000000";

TEST(ZipReader, AnArchiveOfAnotherProgramIsReadAndMarked) {
  const ZipIndex index = index_of(from_hex(kPythonZip));
  EXPECT_FALSE(index.torch_dialect);
  EXPECT_EQ(index.prefix, "archive");
  ASSERT_EQ(index.records.size(), 2u);
  EXPECT_EQ(index.records[1].data_offset, 50 + 30 + 15);
  EXPECT_EQ(index.records[1].crc32, crc32_of(bytes_of("3\n")));
}

TEST(ZipReader, AnyDamageToAnotherProgramsArchiveEndsInAnErrorOrInTheSamePayloads) {
  const std::string good = from_hex(kPythonZip);
  const ZipIndex expected = index_of(good);
  for (size_t at = 0; at < good.size(); ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string bad = good;
      bad[at] = static_cast<char>(bad[at] ^ (1 << bit));
      try {
        const ZipIndex index = index_of(bad);
        ASSERT_EQ(index.records.size(), expected.records.size()) << at;
        for (size_t i = 0; i < index.records.size(); ++i) {
          EXPECT_EQ(index.records[i].data_offset, expected.records[i].data_offset) << at;
          EXPECT_EQ(index.records[i].size_bytes, expected.records[i].size_bytes) << at;
        }
      } catch (const Error&) {  // anything else fails the test
      }
    }
  }
}

TEST(ZipReader, AnExtraFieldOfOneByteIsRefused) {
  std::string bytes = from_hex(kPythonZip);
  bytes.replace(28, 2, little(1, 2));  // extra length of the first local header
  bytes.insert(46, "x");
  const auto shift = [&](size_t at) { bytes[at] = static_cast<char>(bytes[at] + 1); };
  shift(97 + 1 + 62 + 42);  // header offset of the second record
  shift(bytes.size() - 6);  // offset of the directory
  EXPECT_EQ(refusal(bytes).code, ErrorCode::kCorrupt);
}

TEST(ZipReader, CompressedRecordsAreRefused) {
  std::string bytes = from_hex(kPythonZip);
  bytes[8] = 8;
  bytes[97 + 10] = 8;
  const ErrorInfo info = refusal(bytes);
  EXPECT_EQ(info.code, ErrorCode::kCorrupt);
  EXPECT_NE(info.what.find("compression method"), std::string::npos) << info.what;
}

// ---- real sizes, as holes -----------------------------------------------------------------------

class ZipFile : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (std::filesystem::temp_directory_path() / "isoshard-zip-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    root_ = pattern;
  }
  void TearDown() override { std::filesystem::remove_all(root_); }

  // Zeros for every record but the last, which holds `tail`.
  ZipIndex write_and_read(ZipLayout* layout, const std::string& tail) {
    std::vector<uint32_t> crcs;
    for (int i = 0; i < layout->count(); ++i) {
      const auto zeros = crc32_polynomial().finish(0, layout->record(i).size_bytes);
      crcs.push_back(static_cast<uint32_t>(zeros));
    }
    crcs.back() = crc32_of(bytes_of(tail));
    const auto file = storage_.create(root_ + "/f");
    for (int i = 0; i < layout->count(); ++i) {
      const ZipRecord& record = layout->record(i);
      file->write_at(record.header_offset, bytes_of(layout->header(i)));
      const std::string descriptor = layout->descriptor(i, crcs[static_cast<size_t>(i)]);
      file->write_at(record.data_offset + record.size_bytes, bytes_of(descriptor));
    }
    const ZipRecord& last = layout->record(layout->count() - 1);
    file->write_at(last.data_offset, bytes_of(tail));
    file->write_at(layout->directory_offset(), bytes_of(layout->directory(crcs)));
    file->close();
    const auto reader = storage_.open_read(root_ + "/f");
    std::string found(tail.size(), '\0');
    ZipIndex index = read_zip_index(*reader);
    reader->read_at(index.records.back().data_offset, std::as_writable_bytes(std::span(found)));
    EXPECT_EQ(found, tail);
    return index;
  }

  PosixStorage storage_;
  std::string root_;
};

TEST_F(ZipFile, RecordsAroundFourGiBAreReadBack) {
  for (int64_t size : {kMax32 - 1, kMax32, kMax32 + 1, kMax32 + 1 + 64}) {
    ZipLayout layout;
    layout.add("a/data/0", size);
    layout.add("a/data/1", 12345);
    layout.add("a/data/2", 0);
    layout.add("a/data/3", size);
    layout.add("a/version", 2);
    const ZipIndex index = write_and_read(&layout, "3\n");
    for (int i = 0; i < layout.count(); ++i) {
      const ZipRecord& found = index.records[static_cast<size_t>(i)];
      EXPECT_EQ(found.data_offset, layout.record(i).data_offset) << size;
      EXPECT_EQ(found.size_bytes, layout.record(i).size_bytes) << size;
    }
    storage_.remove_file(root_ + "/f");
  }
}

TEST_F(ZipFile, HeadersJustBelowAndAtFourGiBAreReadBack) {
  for (int64_t filler = kMax32 - 90; filler < kMax32 - 60; ++filler) {
    ZipLayout layout;
    layout.add("a/f", filler);
    layout.add("a/version", 2);
    write_and_read(&layout, "3\n");
    storage_.remove_file(root_ + "/f");
  }
}

TEST_F(ZipFile, AHugeHoleThatIsCalledADirectoryAllocatesNothing) {
  constexpr int64_t kSize = int64_t{1} << 43;
  const std::string end64 = "PK\x06\x06"s + little(44, 8) + little(0x031E, 2) + little(0x002D, 2) +
                            little(0, 8) + little(1, 8) + little(1, 8) + little(kSize, 8) +
                            little(0, 8);
  const std::string locator = "PK\x06\x07"s + little(0, 4) + little(kSize, 8) + little(1, 4);
  const std::string end = "PK\x05\x06"s + little(0, 4) + little(1, 2) + little(1, 2) +
                          little(0xFFFFFFFF, 4) + little(0, 4) + little(0, 2);
  const auto file = storage_.create(root_ + "/f");
  try {
    file->write_at(kSize, bytes_of(end64 + locator + end));
  } catch (const Error&) {
    GTEST_SKIP() << "this file system has no files of 8 TiB";
  }
  file->close();
  EXPECT_THROW(read_zip_index(*storage_.open_read(root_ + "/f")), Error);
}

}  // namespace
}  // namespace isoshard::checkpoint
