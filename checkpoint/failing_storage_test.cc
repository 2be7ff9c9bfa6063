// What a disk reports at one call, and what the call leaves behind.
#include "checkpoint/failing_storage.h"

#include <gtest/gtest.h>

#include <cerrno>

#include "checkpoint/volatile_storage.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text));
}

ErrorInfo error_of(const std::function<void()>& work) {
  try {
    work();
  } catch (const Error& error) {
    return error.info();
  }
  return {};
}

TEST(FailingStorage, TheErrorIsTheDisksOwnAndStrikesOnce) {
  MemoryStorage disk;
  FailingStorage storage(disk, {.at = 1, .error = EDQUOT});
  storage.make_directory("/a");
  const ErrorInfo info = error_of([&] { storage.make_directory("/b"); });
  EXPECT_EQ(info.code, ErrorCode::kNoSpace);
  EXPECT_EQ(info.file, "/b");
  EXPECT_NE(info.found.find("EDQUOT"), std::string::npos);
  EXPECT_FALSE(disk.is_directory("/b"));
  storage.make_directory("/b");
  EXPECT_EQ(storage.failures(), 1);
  EXPECT_EQ(storage.calls().size(), 3u);
}

TEST(FailingStorage, ForEverIsForEveryCallThatCanHaveTheError) {
  MemoryStorage disk;
  FailingStorage storage(disk, {.at = 0, .error = ENOSPC, .forever = true});
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(error_of([&] { storage.make_directory("/b"); }).code, ErrorCode::kNoSpace);
  }
  EXPECT_FALSE(storage.is_directory("/b")) << "looking takes no space";
}

TEST(FailingStorage, HalfOfAWriteArrives) {
  MemoryStorage disk;
  FailingStorage storage(disk, {.at = 1, .error = EIO});
  const auto file = storage.create("/file");
  EXPECT_NE(error_of([&] { file->write_at(0, bytes_of("abcdef")); }).what, "");
  EXPECT_EQ(read_small_file(disk, "/file", 9), "abc");
}

// A second sync does not bring back what the first has dropped.
TEST(FailingStorage, AFailedSyncIsNotRepairedByTheNext) {
  for (const bool fails : {false, true}) {
    VolatileStorage disk;
    FailingStorage storage(disk, {.at = fails ? 2 : -1, .error = EIO});
    const auto file = storage.create("/file");
    file->write_at(0, bytes_of("abcdef"));
    EXPECT_EQ(error_of([&] { file->sync(); }).what.empty(), !fails);
    file->sync();
    storage.sync_directory("/");
    storage.sync_everything("/");
    const auto found = disk.after_crash(Durability::kNoData, 0);
    EXPECT_EQ(read_small_file(*found, "/file", 9), fails ? "" : "abcdef");
  }
}

TEST(FailingStorage, ACloseThatFailsLosesWhatWasNotSynced) {
  for (const bool is_synced : {false, true}) {
    MemoryStorage disk;
    FailingStorage storage(disk, {.at = is_synced ? 3 : 2, .error = ENOSPC});
    const auto file = storage.create("/file");
    file->write_at(0, bytes_of("abcdef"));
    if (is_synced) file->sync();
    EXPECT_EQ(error_of([&] { file->close(); }).code, ErrorCode::kNoSpace);
    EXPECT_EQ(read_small_file(disk, "/file", 9), is_synced ? "abcdef" : "abc");
  }
}

TEST(FailingStorage, PartOfAFolderIsGone) {
  MemoryStorage disk;
  disk.make_directory("/a");
  disk.create("/a/1")->close();
  disk.create("/a/2")->close();
  FailingStorage storage(disk, {.at = 0, .error = EIO});
  EXPECT_NE(error_of([&] { storage.remove_tree("/a"); }).what, "");
  EXPECT_EQ(disk.list("/a").size(), 1u);
}

TEST(FailingStorage, EveryCallHasErrorsThatItsMessageExplains) {
  for (int call = 0; call <= static_cast<int>(StorageCall::kResolve); ++call) {
    EXPECT_GE(errors_of(static_cast<StorageCall>(call)).size(), 2u);
    EXPECT_STRNE(name(static_cast<StorageCall>(call)), "");
  }
}

}  // namespace
}  // namespace isoshard::checkpoint
