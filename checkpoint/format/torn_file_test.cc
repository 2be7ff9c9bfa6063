// Files that were cut at every place, or whose local headers lie.
#include "checkpoint/format/torn_file.h"

#include <gtest/gtest.h>

#include "checkpoint/memory_storage.h"
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

TEST(TornFile, TwoRecordsOfOneNameAreHostile) {
  const std::string bytes = recorded();
  const TornFile whole = read_torn(bytes);
  const auto at = [&](size_t k) {
    return static_cast<size_t>(whole.storages[k].record->header_offset);
  };
  EXPECT_EQ(refusal_of(bytes.substr(0, at(2)) + bytes.substr(at(1))), ErrorCode::kHostile);
}

TEST(TornFile, ADamagedDescriptorCostsOneRecord) {
  std::string bytes = recorded();
  const TornFile whole = read_torn(bytes);
  const ZipRecord& record = *whole.storages[1].record;
  bytes[static_cast<size_t>(record.data_offset + record.size_bytes + 9)] ^= 1;
  const TornFile torn = read_torn(bytes);
  EXPECT_FALSE(torn.storages[1].record);
  EXPECT_NE(torn.storages[1].why.find("descriptor"), std::string::npos);
  EXPECT_TRUE(torn.storages[2].record);
}

}  // namespace
}  // namespace isoshard::checkpoint
