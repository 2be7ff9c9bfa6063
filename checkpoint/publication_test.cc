// A folder appears whole or not at all, on the real disk and in memory alike. Not verified here:
// what a power failure leaves (tests/power_loss_test.cc does that).
#include "checkpoint/publication.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "checkpoint/cancel.h"
#include "checkpoint/memory_storage.h"
#include "checkpoint/object_store_case.h"
#include "checkpoint/posix_storage.h"
#include "checkpoint/real_folder_case.h"
#include "checkpoint/small_file.h"
#include "core/check.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

namespace fs = std::filesystem;

void write(Storage& storage, const std::string& path, const std::string& text) {
  const auto file = storage.create(path);
  file->write_at(0, std::as_bytes(std::span(text)));
  file->close();
}

// Whether the parameter asks for the real disk.
class Publication : public testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    root_ = "/top";
    if (!GetParam()) {
      storage_ = std::make_unique<MemoryStorage>();
      storage_->make_directory(root_);
      return;
    }
    std::string pattern = (fs::temp_directory_path() / "isoshard-test-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    root_ = pattern;
    storage_ = std::make_unique<PosixStorage>();
  }
  static std::string noted() { return {hidden_folder().text, hidden_folder().length.load()}; }
  void TearDown() override {
    cancel_signal() = 0;
    if (GetParam()) fs::remove_all(root_);
  }

  std::string at(const std::string& name) const { return root_ + "/" + name; }
  std::string read(const std::string& name) {
    return read_small_file(*storage_, at(name), 1 << 20);
  }
  std::string names(const std::string& folder = "") {
    std::string all;
    for (const DirectoryEntry& entry : storage_->list(at(folder))) all += entry.name + " ";
    return all;
  }

  std::unique_ptr<Storage> storage_;
  std::string root_;
};

TEST(PublicationInPlace, WithoutRenameTheFinalNameIsThereFromTheBeginning) {
  ObjectStore storage;
  storage.make_directory("/top");
  StagedFolder staged(storage, "/top/out", false);
  EXPECT_TRUE(staged.in_place());
  EXPECT_EQ(staged.path(), "/top/out");
  write(storage, staged.path() + "/f", "text");
  staged.settle();
  staged.publish();
  EXPECT_EQ(read_small_file(storage, "/top/out/f", 99), "text");
  EXPECT_EQ(storage.list("/top").size(), 1u);
  const ErrorInfo taken = error_of([&] { StagedFolder(storage, "/top/out", false); });
  EXPECT_EQ(taken.code, ErrorCode::kExists);
}

// One passing failure must not decide, and --overwrite without a target replaces nothing.
TEST(PublicationInPlace, OverwriteDoesNotRemoveItsOwnResult) {
  for (const int refusals : {1, 2, 3, 1000}) {
    for (const bool renames_empty : {false, true}) {
      ObjectStore storage;
      storage.make_directory("/top");
      storage.refusals = refusals;
      storage.renames_empty = renames_empty;
      StagedFolder staged(storage, "/top/out", true);
      EXPECT_EQ(staged.in_place(), refusals > 1) << refusals;
      write(storage, staged.path() + "/f", "text");
      staged.publish();
      EXPECT_EQ(read_small_file(storage, "/top/out/f", 99), "text");
      EXPECT_EQ(storage.list("/top").size(), 1u);
      EXPECT_FALSE(is_unfinished(storage, "/top/out"));
    }
  }
}

TEST(PublicationInPlace, AnotherFolderUnderTheNameIsNotTouched) {
  for (const bool publishes : {false, true}) {
    ObjectStore storage;
    storage.make_directory("/top");
    {
      StagedFolder staged(storage, "/top/out", false);
      EXPECT_TRUE(is_unfinished(storage, "/top/out"));
      storage.remove_tree("/top/out");
      storage.make_directory("/top/out");
      write(storage, "/top/out/theirs", "precious");
      if (publishes) {
        EXPECT_EQ(error_of([&] { staged.publish(); }).code, ErrorCode::kExists);
      }
    }
    EXPECT_EQ(read_small_file(storage, "/top/out/theirs", 99), "precious");
  }
}

TEST(PublicationInPlace, AFailureLeavesNothing) {
  ObjectStore storage;
  storage.make_directory("/top");
  {
    StagedFolder staged(storage, "/top/new/out", false);
    write(storage, staged.path() + "/f", "text");
  }
  EXPECT_FALSE(storage.is_directory("/top/new/out"));
}

TEST_P(Publication, AFolderAppearsOnlyWhenItIsPublished) {
  StagedFolder staged(*storage_, at("global_step1/"), false);
  storage_->make_directory(staged.path() + "/zero");
  write(*storage_, staged.path() + "/zero/f", "text");
  EXPECT_FALSE(storage_->is_directory(at("global_step1")));
  EXPECT_EQ(leftovers(*storage_, root_).size(), 1u);
  staged.publish();
  EXPECT_EQ(read("global_step1/zero/f"), "text");
  EXPECT_EQ(names(), "global_step1 ");
  EXPECT_EQ(staged.left_behind(), "");
  EXPECT_THROW(staged.publish(), CheckFailure);
}

TEST_P(Publication, WhatIsNotPublishedLeavesNothing) {
  {
    StagedFolder staged(*storage_, at("a/b/tag"), false);
    write(*storage_, staged.path() + "/f", "text");
    EXPECT_TRUE(storage_->is_directory(at("a/b")));
  }
  EXPECT_EQ(names(), "");
}

TEST_P(Publication, ParentsThatOthersUseStay) {
  storage_->make_directory(at("mine"));
  {
    StagedFolder staged(*storage_, at("a/b/tag"), false);
    StagedFolder other(*storage_, at("mine/tag"), false);
    write(*storage_, at("a/theirs"), "text");
  }
  EXPECT_EQ(names(), "a mine ");
  EXPECT_EQ(names("a"), "theirs ");
}

TEST_P(Publication, AnExistingTargetIsRefusedBeforeAnyWork) {
  storage_->make_directory(at("tag"));
  const ErrorInfo info = error_of([&] { StagedFolder(*storage_, at("tag"), false); });
  EXPECT_EQ(info.code, ErrorCode::kExists);
  EXPECT_EQ(info.file, at("tag"));
  EXPECT_NE(info.next.find("--overwrite"), std::string::npos);
  EXPECT_EQ(names(), "tag ");
}

TEST_P(Publication, AFileUnderTheTargetsNameIsNeverReplaced) {
  write(*storage_, at("tag"), "text");
  EXPECT_EQ(error_of([&] { StagedFolder(*storage_, at("tag"), true); }).code, ErrorCode::kExists);
  EXPECT_EQ(error_of([&] { StagedFolder(*storage_, at("tag/in"), true); }).code,
            ErrorCode::kUnreadable);
  EXPECT_EQ(names(), "tag ");
}

TEST_P(Publication, ATargetWithoutANameIsRefused) {
  for (const char* path : {"", "/", ".", "a/.."}) {
    EXPECT_EQ(error_of([&] { StagedFolder(*storage_, path, false); }).code, ErrorCode::kUsage);
  }
}

TEST_P(Publication, OverwritingExchangesTheWholeFolder) {
  storage_->make_directory(at("tag"));
  write(*storage_, at("tag/old"), "old");
  std::unique_ptr<StagedFolder> staged;
  try {
    staged = std::make_unique<StagedFolder>(*storage_, at("tag"), true);
  } catch (const Error& error) {
    EXPECT_EQ(error.info().code, ErrorCode::kUnsupported);
    EXPECT_EQ(error.info().file, at("tag"));
    EXPECT_EQ(names(), "tag ");
    GTEST_SKIP() << "this file system cannot exchange two folders";
  }
  write(*storage_, staged->path() + "/new", "new");
  EXPECT_EQ(names("tag"), "old ");
  staged->publish();
  EXPECT_EQ(names("tag"), "new ");
  EXPECT_EQ(names(), "tag ");
}

TEST_P(Publication, OverwritingNothingIsPublishing) {
  StagedFolder staged(*storage_, at("tag"), true);
  staged.publish();
  EXPECT_EQ(names(), "tag ");
}

TEST_P(Publication, ATargetThatAppearsMeanwhileIsNotTouched) {
  {
    StagedFolder staged(*storage_, at("tag"), false);
    storage_->make_directory(at("tag"));
    write(*storage_, at("tag/theirs"), "text");
    const ErrorInfo info = error_of([&] { staged.publish(); });
    EXPECT_EQ(info.code, ErrorCode::kExists);
    EXPECT_NE(info.safe.find("nothing was published"), std::string::npos);
  }
  EXPECT_EQ(names(), "tag ");
  EXPECT_EQ(names("tag"), "theirs ");
}

TEST_P(Publication, OfTwoWritersOneWins) {
  StagedFolder first(*storage_, at("tag"), false);
  StagedFolder second(*storage_, at("tag"), false);
  EXPECT_NE(first.path(), second.path());
  write(*storage_, second.path() + "/f", "second");
  second.publish();
  EXPECT_EQ(error_of([&] { first.publish(); }).code, ErrorCode::kExists);
  EXPECT_EQ(read("tag/f"), "second");
}

TEST_P(Publication, ACancelledCommandPublishesNothing) {
  {
    StagedFolder staged(*storage_, at("tag"), false);
    cancel_signal() = SIGTERM;
    const ErrorInfo info = error_of([&] { staged.publish(); });
    EXPECT_EQ(info.code, ErrorCode::kInterrupted);
    EXPECT_NE(info.what.find("signal 15"), std::string::npos);
  }
  EXPECT_EQ(names(), "");
}

TEST_P(Publication, HiddenNamesHaveNoneOfDeepSpeedsPatternsAndFit) {
  for (const std::string& name :
       {std::string("zero_pp_rank_0_mp_rank_00"), std::string("mp_rank_mp_rank_"),
        std::string(255, 'x'), std::string(127, 'x') + std::string("\xC3\xA4\xC3\xA4")}) {
    StagedFolder staged(*storage_, at(name), false);
    const std::string hidden = staged.path().substr(root_.size() + 1);
    EXPECT_EQ(hidden.front(), '.');
    EXPECT_EQ(hidden.find("mp_rank_"), std::string::npos);
    EXPECT_EQ(hidden.find("pp_rank_"), std::string::npos);
    EXPECT_LE(hidden.size(), 255u);
    staged.publish();
    EXPECT_TRUE(storage_->is_directory(at(name)));
  }
}

TEST_P(Publication, ASmallFileIsMadeAndReplaced) {
  replace_small_file(*storage_, at("latest"), "global_step1");
  replace_small_file(*storage_, at("latest"), "global_step2");
  EXPECT_EQ(read("latest"), "global_step2");
  EXPECT_EQ(names(), "latest ");
  storage_->make_directory(at("folder"));
  EXPECT_THROW(replace_small_file(*storage_, at("folder"), "x"), Error);
  EXPECT_EQ(names(), "folder latest ");
}

// Of more than one piece, and of a rest.
TEST_P(Publication, ALargeFileIsCopiedPieceByPiece) {
  std::string text;
  for (int i = 0; text.size() < (5u << 19); ++i) text += std::to_string(i) + ' ';
  write(*storage_, at("a"), text);
  copy_file(*storage_, at("a"), at("b"));
  EXPECT_TRUE(read_small_file(*storage_, at("b"), 1 << 23) == text);
  EXPECT_TRUE(same_bytes(*storage_, at("a"), at("b")));
  text.back() = 'x';
  write(*storage_, at("c"), text);
  EXPECT_FALSE(same_bytes(*storage_, at("a"), at("c")));
  write(*storage_, at("d"), text + 'x');
  EXPECT_FALSE(same_bytes(*storage_, at("c"), at("d")));
}

TEST_P(Publication, LeftoversAreOnlyNamesThatAreOurs) {
  const std::string nonce = "0123456789abcdef0123456789abcdef";
  for (const std::string& name :
       {".tag.isoshard-" + nonce, ".trash-" + nonce, ".trash-" + nonce + "0", ".trash-x" + nonce,
        "tag.isoshard-" + nonce, std::string(".trash-1"), std::string(".hidden")}) {
    storage_->make_directory(at(name));
  }
  EXPECT_EQ(leftovers(*storage_, root_),
            (std::vector<std::string>{".tag.isoshard-" + nonce, ".trash-" + nonce}));
  EXPECT_TRUE(leftovers(*storage_, at("none")).empty());
}

TEST_P(Publication, ManyThreadsNeverShareAHiddenName) {
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([this] {
      for (int round = 0; round < 50; ++round) StagedFolder(*storage_, at("tag"), false);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(names(), "");
}

TEST_P(Publication, TheHiddenFolderIsNotedWhileItIsThere) {
  EXPECT_EQ(noted(), "");
  {
    StagedFolder staged(*storage_, at("whole"), false);
    EXPECT_EQ(noted(), quote(staged.path()));
    staged.publish();
    EXPECT_EQ(noted(), "");
  }
  {
    StagedFolder staged(*storage_, at("dropped"), false);
    EXPECT_EQ(noted(), quote(staged.path()));
  }
  EXPECT_EQ(noted(), "");
}

INSTANTIATE_TEST_SUITE_P(, Publication, testing::Bool(), [](const auto& each) {
  return std::string(each.param ? "OnDisk" : "InMemory");
});

}  // namespace
}  // namespace isoshard::checkpoint
