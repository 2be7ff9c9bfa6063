// Files that were cut at every place, or whose local headers lie.
#include "checkpoint/format/torn_file.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <cstring>

#include "checkpoint/format/crc.h"
#include "checkpoint/memory_storage.h"
#include "checkpoint/posix_error.h"
#include "checkpoint/posix_storage.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

const char* const kFile =
    "/deepspeed/z1_bf16_dp2/ckpt/global_step3/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt";

std::string recorded() {
  PosixStorage disk;
  return read_small_file(disk, ISOSHARD_TRACES + std::string(kFile), 1 << 20);
}

TornFile read_torn(const std::string& bytes) {
  MemoryStorage memory;
  const std::unique_ptr<WritableFile> file = memory.create("/torn.pt");
  file->write_at(0, std::as_bytes(std::span(bytes)));
  file->close();
  return read_torn_file(*memory.open_read("/torn.pt"));
}

ErrorCode refusal_of(const std::string& bytes) {
  try {
    read_torn(bytes);
  } catch (const Error& error) {
    return error.info().code;
  }
  return ErrorCode::kUsage;
}

TEST(TornFile, AWholeFileHasAllItsStorages) {
  const std::string bytes = recorded();
  MemoryStorage memory;
  const std::unique_ptr<WritableFile> file = memory.create("/whole.pt");
  file->write_at(0, std::as_bytes(std::span(bytes)));
  file->close();
  const ZipIndex index = read_zip_index(*memory.open_read("/whole.pt"));
  const TornFile torn = read_torn(bytes);
  ASSERT_EQ(torn.storages.size(), 4u);
  for (size_t k = 0; k < torn.storages.size(); ++k) {
    const ZipRecord& expected = index.records.at(k + 4);
    ASSERT_TRUE(torn.storages[k].record);
    EXPECT_EQ(torn.storages[k].record->name, expected.name);
    EXPECT_EQ(torn.storages[k].record->data_offset, expected.data_offset);
    EXPECT_EQ(torn.storages[k].record->size_bytes, expected.size_bytes);
    EXPECT_EQ(torn.storages[k].record->crc32, expected.crc32);
  }
}

TEST(TornFile, ACutLeavesTheRecordsBeforeIt) {
  const std::string bytes = recorded();
  const TornFile whole = read_torn(bytes);
  const size_t pickle_end = 128 + whole.pickle.size() + 16;
  for (size_t cut = 0; cut < bytes.size(); cut += 5) {
    const std::string part = bytes.substr(0, cut);
    if (cut < pickle_end) {
      const ErrorCode code = refusal_of(part);
      EXPECT_TRUE(code == ErrorCode::kIncomplete || code == ErrorCode::kCorrupt) << cut;
      continue;
    }
    const TornFile torn = read_torn(part);
    for (size_t k = 0; k < whole.storages.size(); ++k) {
      const ZipRecord& record = *whole.storages[k].record;
      const auto end = static_cast<size_t>(record.data_offset + record.size_bytes + 16);
      EXPECT_EQ(torn.storages[k].record.has_value(), end <= cut) << cut << " data/" << k;
      EXPECT_EQ(torn.storages[k].why.empty(), end <= cut) << cut << " data/" << k;
    }
  }
}

TEST(TornFile, AFlippedPickleIsRefused) {
  std::string bytes = recorded();
  bytes[300] ^= 4;
  EXPECT_EQ(refusal_of(bytes), ErrorCode::kCorrupt);
}

size_t header_of(const TornFile& whole, size_t k) {
  return static_cast<size_t>(whole.storages[k].record->header_offset);
}

// The directory and what follows it. Without them nothing but the records says what they are.
std::string without_directory(const std::string& bytes) {
  return bytes.substr(0, bytes.find("PK\1\2"));
}

void put_crc(std::string* bytes, size_t at, uint32_t crc) { std::memcpy(&(*bytes)[at], &crc, 4); }

// Other bytes in every storage of a few bytes and more, under the right CRCs: the next save.
std::string next_save(std::string bytes) {
  const TornFile whole = read_torn(bytes);
  for (const TornStorage& storage : whole.storages) {
    const auto at = static_cast<size_t>(storage.record->data_offset);
    const auto size = static_cast<size_t>(storage.size_bytes);
    for (size_t i = at; i < at + size; ++i) bytes[i] = static_cast<char>(bytes[i] + 1);
    const uint32_t crc = crc32_of(std::as_bytes(std::span(bytes).subspan(at, size)));
    put_crc(&bytes, at + size + 4, crc);
    const std::string name = whole.prefix + "/" + storage.record->name;
    put_crc(&bytes, bytes.rfind(name) - 30, crc);  // 46 bytes stand before a name, the CRC at 16
  }
  return bytes;
}

std::string proven(const TornFile& torn) {
  std::string keys;
  for (size_t k = 0; k < torn.storages.size(); ++k) {
    EXPECT_EQ(torn.storages[k].record.has_value(), torn.storages[k].why.empty());
    if (torn.storages[k].record) keys += std::to_string(k);
  }
  return keys;
}

TEST(TornFile, AFreshSaveIsWhole) {
  const std::string fresh = next_save(recorded());
  EXPECT_EQ(proven(read_torn(fresh)), "0123");
  MemoryStorage memory;
  const std::unique_ptr<WritableFile> file = memory.create("/fresh.pt");
  file->write_at(0, std::as_bytes(std::span(fresh)));
  file->close();
  EXPECT_NO_THROW(read_zip_index(*memory.open_read("/fresh.pt")));
}

// DeepSpeed's fast writer opens a file that is there without cutting it off: where the new save
// ends early, whole records of the old one follow, and its directory.
TEST(TornFile, RecordsOfAnOlderSaveAreNotProven) {
  const std::string older = recorded(), newer = next_save(older);
  const TornFile whole = read_torn(older);
  const auto end = [&](size_t k) {
    return static_cast<size_t>(whole.storages[k].record->data_offset +
                               whole.storages[k].size_bytes);
  };
  for (size_t k = 0; k + 1 < whole.storages.size(); ++k) {
    const std::string keys = std::string("0123").substr(0, k + 1);
    for (size_t at :
         {end(k) + 8, header_of(whole, k + 1), header_of(whole, k + 1) + 40, end(k + 1) - 3}) {
      const std::string mixed = newer.substr(0, at) + older.substr(at);
      EXPECT_EQ(proven(read_torn(mixed)), keys) << "data/" << k << " at " << at;
      if (at != end(k + 1) - 3) continue;  // the break shows without the directory too
      EXPECT_EQ(proven(read_torn(without_directory(mixed))), keys) << at;
    }
  }
}

TEST(TornFile, ANameIsNotBelieved) {
  const std::string bytes = recorded();
  const TornFile whole = read_torn(bytes);
  for (size_t k = 0; k < whole.storages.size(); ++k) {
    for (char digit = '0'; digit <= '9'; ++digit) {
      std::string other = bytes;
      const size_t at = other.find("/data/" + std::to_string(k), header_of(whole, k)) + 6;
      if (other[at] == digit) continue;
      other[at] = digit;
      const std::string before = std::string("0123").substr(0, k);
      EXPECT_EQ(proven(read_torn(without_directory(other))), before) << k << digit;
      const TornFile found = read_torn(other);  // the directory knows
      ASSERT_EQ(proven(found), "0123") << k << digit;
      for (size_t j = 0; j < found.storages.size(); ++j)
        EXPECT_EQ(found.storages[j].record->data_offset, whole.storages[j].record->data_offset);
    }
  }
}

TEST(TornFile, ARecordThatIsThereTwiceEndsTheChain) {
  const std::string bytes = recorded();
  const TornFile whole = read_torn(bytes);
  const std::string twice =
      bytes.substr(0, header_of(whole, 2)) + bytes.substr(header_of(whole, 1));
  EXPECT_EQ(proven(read_torn(twice)), "01");
}

TEST(TornFile, AWholeArchiveBeforeAStaleTailIsRead) {
  const std::string older = recorded(), newer = next_save(older);
  const TornFile whole = read_torn(older);
  EXPECT_EQ(proven(read_torn(newer + older.substr(header_of(whole, 2)))), "0123");
}

TEST(TornFile, ADamagedDescriptorEndsTheChainUnlessTheDirectoryIsThere) {
  std::string bytes = recorded();
  const TornFile whole = read_torn(bytes);
  const ZipRecord& record = *whole.storages[1].record;
  bytes[static_cast<size_t>(record.data_offset + record.size_bytes + 9)] ^= 1;
  const TornFile torn = read_torn(without_directory(bytes));
  EXPECT_EQ(proven(torn), "0");
  EXPECT_NE(torn.storages[1].why.find("descriptor"), std::string::npos);
  EXPECT_NE(torn.storages[2].why.find("older save"), std::string::npos);
  EXPECT_EQ(proven(read_torn(bytes)), "0123");
}

TEST(TornFile, WrongBytesEndTheChainUnlessTheDirectoryIsThere) {
  std::string bytes = recorded();
  const TornFile whole = read_torn(bytes);
  bytes[static_cast<size_t>(whole.storages[1].record->data_offset)] ^= 1;
  EXPECT_EQ(proven(read_torn(without_directory(bytes))), "0");
  EXPECT_EQ(proven(read_torn(bytes)), "023");
}

TEST(TornFile, OneWrongByteOfTheDirectoryCostsNothing) {
  const std::string bytes = recorded();
  for (size_t at = bytes.find("PK\1\2"); at < bytes.size(); ++at) {
    std::string other = bytes;
    other[at] ^= 0x15;
    EXPECT_EQ(proven(read_torn(other)), "0123") << at;
  }
}

// A save of a machine of the other byte order has bytes that look alike and mean something else.
TEST(TornFile, TheByteOrderIsAsked) {
  const std::string bytes = recorded();
  const size_t at = bytes.find("little");
  std::string damaged = bytes;
  damaged[at] ^= 1;
  EXPECT_EQ(proven(read_torn(without_directory(damaged))), "");
  EXPECT_EQ(proven(read_torn(damaged)), "");
  for (const std::string order : {"big", "biggie"}) {
    std::string other = bytes;
    std::memcpy(&other[at], order.data(), order.size());
    std::memcpy(&other[at + order.size()], "PK\7\10", 4);
    put_crc(&other, at + order.size() + 4, crc32_of(std::as_bytes(std::span(order))));
    for (size_t i : {8, 12}) put_crc(&other, at + order.size() + i, order.size());
    EXPECT_EQ(refusal_of(without_directory(other)), ErrorCode::kCorrupt) << order;
  }
}

TEST(TornFile, AnUnknownVersionIsRefused) {
  std::string bytes = recorded();
  const size_t at = bytes.find("3\nPK\7\10");
  bytes[at] = '4';
  put_crc(&bytes, at + 6, crc32_of(std::as_bytes(std::span(bytes).subspan(at, 2))));
  EXPECT_EQ(refusal_of(without_directory(bytes)), ErrorCode::kCorrupt);
}

// Bytes [begin, end) cannot be read.
class BadFile : public ReadableFile {
 public:
  BadFile(std::string bytes, size_t begin, size_t end, int error)
      : bytes_(std::move(bytes)), begin_(begin), end_(end), error_(error) {}
  const std::string& path() const override { return path_; }
  int64_t size_bytes() const override { return static_cast<int64_t>(bytes_.size()); }
  void read_at(int64_t offset, std::span<std::byte> target) const override {
    const auto from = static_cast<size_t>(offset);
    if (from < end_ && begin_ < from + target.size()) fail_system(error_, {"Reading", path_});
    std::memcpy(target.data(), bytes_.data() + from, target.size());
  }
  int64_t next_data(int64_t offset) const override { return offset; }
  int64_t next_hole(int64_t) const override { return size_bytes(); }

 private:
  std::string path_ = "/bad.pt", bytes_;
  size_t begin_, end_;
  int error_;
};

TEST(TornFile, ABadSectorCostsWhatItHolds) {
  const std::string bytes = recorded();
  const TornFile whole = read_torn(bytes);
  const size_t header = header_of(whole, 2);
  const auto payload = static_cast<size_t>(whole.storages[2].record->data_offset);
  EXPECT_EQ(proven(read_torn_file(BadFile(bytes, header, header + 9, EIO))), "0123");
  EXPECT_EQ(proven(read_torn_file(BadFile(without_directory(bytes), header, header + 9, EIO))),
            "01");
  EXPECT_EQ(proven(read_torn_file(BadFile(bytes, payload, payload + 1, EIO))), "013");
  EXPECT_THROW(read_torn_file(BadFile(bytes, header, header + 9, ESTALE)), Error);
  EXPECT_THROW(read_torn_file(BadFile(bytes, payload, payload + 1, ENOMEM)), Error);
}

TEST(TornFile, StoragesThatAddUpToMoreThanAFileAreRefused) {
  std::string pickle = "\x80\x02]";
  for (char key = '0'; key <= '8'; ++key) {
    pickle += std::string("(X\7\0\0\0storagectorch\nDoubleStorage\nX\1\0\0\0", 39) + key;
    pickle += std::string("X\3\0\0\0cpu\x8a\7\0\0\0\0\0\0\x40tQa", 20);  // 2 to the 54th
  }
  try {
    storage_sizes(pickle + ".", "/large.pt");
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.info().code, ErrorCode::kLimit) << error.what();
  }
}

}  // namespace
}  // namespace isoshard::checkpoint
