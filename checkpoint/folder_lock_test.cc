// Locks of folders on the real disk, and what lies under a name.
#include "checkpoint/folder_lock.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "checkpoint/publication.h"
#include "checkpoint/real_folder_case.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

namespace fs = std::filesystem;
using Kind = OwnEntry::Kind;
using State = LockAnswer::State;

class FolderLocks : public testing::Test, protected RealFolder {
 protected:
  void SetUp() override {
    fs::create_directory(at("folder"));
    std::ofstream(at("file")) << "some bytes";
    fs::create_symlink("nowhere", at("link"));
    fs::create_symlink("circle", at("circle"));
  }
};

// Another descriptor stands for another program: flock() asks who has opened, not which process.
TEST_F(FolderLocks, WhatAnotherHoldsIsNotTaken) {
  const int other = ::open(at("folder").c_str(), O_RDONLY | O_DIRECTORY);
  ASSERT_EQ(::flock(other, LOCK_EX), 0);
  EXPECT_EQ(lock_folder(storage_, at("folder")).state, State::kTheirs);
  const ErrorInfo info = error_of([&] { lock_new_folder(storage_, at("folder")); });
  EXPECT_EQ(info.code, ErrorCode::kExists);
  EXPECT_EQ(info.safe, "nothing was published");
  ::close(other);
  EXPECT_EQ(lock_folder(storage_, at("folder")).state, State::kOurs);
}

TEST_F(FolderLocks, OnlyAFolderOfItsOwnIsLocked) {
  error_of([&] { lock_folder(storage_, at("none")); });
  error_of([&] { lock_folder(storage_, at("link")); });
  error_of([&] { lock_folder(storage_, at("file")); });
}

TEST_F(FolderLocks, EntriesAreOfThisUserAndHaveOneName) {
  EXPECT_EQ(look_at(at("folder")).kind, Kind::kFolder);
  EXPECT_EQ(look_at(at("file")).kind, Kind::kFile);
  EXPECT_EQ(look_at(at("file")).size_bytes, 10);
  EXPECT_EQ(look_at(at("link")).kind, Kind::kOther);
  EXPECT_EQ(look_at(at("none")).kind, Kind::kOther);
  EXPECT_EQ(look_at(at("file/inside")).kind, Kind::kOther);
  fs::create_hard_link(at("file"), at("second"));
  EXPECT_EQ(look_at(at("file")).kind, Kind::kOther);
  EXPECT_EQ(error_of([&] { look_at(at(std::string(300, 'x'))); }).code, ErrorCode::kUnreadable);
}

TEST_F(FolderLocks, ALinkThatLeadsNowhereKeepsItsName) {
  const ErrorInfo info = error_of([&] { StagedFolder(storage_, at("link"), false); });
  EXPECT_EQ(info.code, ErrorCode::kExists);
  EXPECT_EQ(info.found, "a link that leads nowhere, or a device");
  EXPECT_TRUE(fs::is_symlink(at("link")));
}

TEST_F(FolderLocks, ACircleOfLinksHasNoPath) {
  EXPECT_EQ(error_of([&] { storage_.canonical(at("circle")); }).code, ErrorCode::kUnreadable);
}

// What the file holds stays, whatever the kernel forgets of it.
TEST_F(FolderLocks, AFileWhoseCacheIsDroppedIsReadAgain) {
  storage_.drop_cache(at("file"));
  EXPECT_EQ(read_small_file(storage_, at("file"), 100), "some bytes");
}

}  // namespace
}  // namespace isoshard::checkpoint
