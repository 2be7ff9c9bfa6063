// What an interrupted publication left is taken up by one, never from a living writer, and nothing
// outside it changes. On the real disk, as memory has no locks and no links.
#include "checkpoint/leftover_folder.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <thread>

#include "checkpoint/hidden_name.h"
#include "checkpoint/memory_storage.h"
#include "checkpoint/publication.h"
#include "checkpoint/real_folder_case.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

namespace fs = std::filesystem;

class Leftover : public testing::Test, protected RealFolder {
 protected:
  void SetUp() override {
    LockAnswer answer = lock_folder(storage_, root_);
    if (answer.state == LockAnswer::State::kUnknown)
      GTEST_SKIP() << "this file system has no locks on folders: " << root_;
  }
  static void write(const std::string& path, const std::string& text) {
    std::ofstream(path, std::ios::binary) << text;
  }
  static std::string text_of(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  // A leftover of a publication of `name` with one file of so many bytes.
  std::string lay(const std::string& name, size_t bytes) {
    const std::string folder = at(hidden_name(name));
    fs::create_directory(folder);
    if (bytes > 0) write(folder + "/part", std::string(bytes, 'x'));
    return folder;
  }
  LeftoverSearch search() { return find_leftover_folder(storage_, at("target")); }
};

TEST_F(Leftover, ALockIsHeldByOneAndGoesWithTheFolder) {
  const std::string folder = lay("target", 1);
  LockAnswer first = lock_folder(storage_, folder);
  EXPECT_EQ(first.state, LockAnswer::State::kOurs);
  EXPECT_EQ(lock_folder(storage_, folder).state, LockAnswer::State::kTheirs);
  fs::rename(folder, at("other"));
  EXPECT_EQ(lock_folder(storage_, at("other")).state, LockAnswer::State::kTheirs);
  EXPECT_THROW(lock_folder(storage_, folder), Error);
  first.lock.reset();
  EXPECT_EQ(lock_folder(storage_, at("other")).state, LockAnswer::State::kOurs);
  fs::create_directory_symlink(at("other"), at("link"));
  EXPECT_THROW(lock_folder(storage_, at("link")), Error) << "a link is not followed";
}

TEST_F(Leftover, TheOneThatHoldsMostIsTakenAndOthersAreNamed) {
  const std::string less = lay("target", 5'000), more = lay("target", 50'000);
  lay("target", 0);
  lay("targets", 90'000);
  write(at(hidden_name("target")), "a pointer that was to be replaced");
  const LeftoverSearch found = search();
  ASSERT_NE(found.found, nullptr);
  EXPECT_EQ(found.found->path, more);
  ASSERT_EQ(found.passed_over.size(), 1u);
  EXPECT_NE(found.passed_over[0].find(less), std::string::npos);
  const LeftoverSearch second = search();
  ASSERT_NE(second.found, nullptr) << "the first is held, the other is left";
  EXPECT_EQ(second.found->path, less);
}

TEST_F(Leftover, ALivingWriterIsPassedOver) {
  StagedFolder writer(storage_, at("target"), false);
  write(writer.path() + "/part", "half");
  const LeftoverSearch found = search();
  EXPECT_EQ(found.found, nullptr);
  ASSERT_EQ(found.passed_over.size(), 1u);
  EXPECT_NE(found.passed_over[0].find("holds its lock"), std::string::npos);
}

TEST_F(Leftover, WhatATargetOfOursMayHaveReplacedIsPassedOver) {
  lay("target", 10);
  fs::create_directory(at("target"));
  EXPECT_NE(search().found, nullptr);
  write(at("target/MANIFEST.json"), "{}");
  EXPECT_EQ(search().found, nullptr);
}

TEST_F(Leftover, OneWithAManifestIsPassedOverForOneThatHasLess) {
  const std::string whole = lay("target", 50'000), part = lay("target", 10);
  write(whole + "/MANIFEST.json", "{}");
  const LeftoverSearch found = search();
  ASSERT_NE(found.found, nullptr);
  EXPECT_EQ(found.found->path, part);
  EXPECT_EQ(found.found->files, 1);
  ASSERT_EQ(found.passed_over.size(), 1u);
  EXPECT_NE(found.passed_over[0].find(whole), std::string::npos);
  EXPECT_NE(found.passed_over[0].find("one that was replaced"), std::string::npos);
  EXPECT_EQ(lock_folder(storage_, whole).state, LockAnswer::State::kOurs) << "not held on";
}

TEST_F(Leftover, OneThatIsKeptLosesItsManifest) {
  {
    StagedFolder staged(storage_, at("target"), false);
    write(staged.path() + "/part", "all");
    write(staged.path() + "/MANIFEST.json", "{}");
    staged.keep();
  }
  const LeftoverSearch found = search();
  ASSERT_NE(found.found, nullptr);
  EXPECT_EQ(text_of(found.found->path + "/part"), "all");
}

TEST_F(Leftover, AReplacedFolderThatIsKeptLosesNothing) {
  fs::create_directory(at("target"));
  write(at("target/MANIFEST.json"), "old");
  StagedFolder staged(storage_, at("target"), true);
  write(staged.path() + "/part", "new");
  staged.publish();
  fs::create_directory(staged.path());
  write(staged.path() + "/MANIFEST.json", "old");
  staged.keep();
  EXPECT_EQ(text_of(staged.path() + "/MANIFEST.json"), "old");
}

TEST_F(Leftover, ALockThatIsHeldForAMomentIsAskedForAgain) {
  const std::string folder = lay("target", 1);
  LockAnswer held = lock_folder(storage_, folder);
  EXPECT_EQ(lock_folder_patiently(storage_, folder, 2).state, LockAnswer::State::kTheirs);
  std::thread moment([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    held.lock.reset();
  });
  EXPECT_EQ(lock_folder_patiently(storage_, folder, 10'000).state, LockAnswer::State::kOurs);
  moment.join();
}

TEST(LeftoverWriter, IsDeadWhereTheLockIsOursAndOnSharedDisksNothingChangedBesides) {
  const std::string here = hidden_name("target"), other = here + "0";
  const auto lives = [](LockAnswer::State state, bool shared, const std::string& path,
                        int64_t quiet) {
    return !why_its_writer_may_live({.state = state, .lock = {}, .shared = shared}, path, quiet)
                .empty();
  };
  using State = LockAnswer::State;
  EXPECT_FALSE(lives(State::kOurs, false, other, 0));
  EXPECT_FALSE(lives(State::kOurs, true, here, kQuietSharedLeftoverSeconds));
  EXPECT_TRUE(lives(State::kOurs, true, here, kQuietSharedLeftoverSeconds - 1));
  EXPECT_TRUE(lives(State::kOurs, true, here, -5)) << "of a clock that is ahead";
  EXPECT_TRUE(lives(State::kOurs, true, other, kQuietSharedLeftoverSeconds));
  EXPECT_TRUE(lives(State::kTheirs, false, here, kQuietSharedLeftoverSeconds));
  EXPECT_TRUE(lives(State::kUnknown, false, here, kQuietSharedLeftoverSeconds));
}

TEST_F(Leftover, WhereThereAreNoLocksNothingIsFound) {
  MemoryStorage memory;
  memory.make_directories("/top/" + hidden_name("target"));
  EXPECT_EQ(find_leftover_folder(memory, "/top/target").found, nullptr);
}

TEST_F(Leftover, ItIsTakenUpPublishedAndNeverFoundAgain) {
  const std::string folder = lay("target", 4);
  {
    StagedFolder staged(storage_, at("target"), false, search().found);
    EXPECT_TRUE(staged.resumed());
    EXPECT_NE(staged.path(), folder);
    EXPECT_EQ(text_of(staged.path() + "/part"), "xxxx");
    EXPECT_EQ(search().found, nullptr);
    staged.publish();
  }
  EXPECT_EQ(text_of(at("target/part")), "xxxx");
  EXPECT_EQ(search().found, nullptr);
}

TEST_F(Leftover, WhatIsGoneMeanwhileIsNoFailure) {
  const std::string folder = lay("target", 4);
  LeftoverSearch found = search();
  fs::rename(folder, at("moved"));
  StagedFolder staged(storage_, at("target"), false, std::move(found.found));
  EXPECT_FALSE(staged.resumed());
  EXPECT_TRUE(fs::is_empty(staged.path()));
  staged.publish();
}

TEST_F(Leftover, OneThatIsKeptIsFoundAgainAndOneThatFailsIsRemoved) {
  lay("target", 4);
  { StagedFolder(storage_, at("target"), false, search().found).keep(); }
  EXPECT_NE(search().found, nullptr);
  { StagedFolder staged(storage_, at("target"), false, search().found); }
  EXPECT_EQ(search().found, nullptr);
  EXPECT_TRUE(fs::is_empty(root_));
}

TEST_F(Leftover, OnlyPlainFilesOfThePlanStayAndNothingOutsideChanges) {
  const std::string folder = lay("target", 4);
  write(at("outside"), "mine");
  fs::create_directory(at("place"));
  write(at("place/b"), "mine too");
  fs::create_directories(folder + "/sub/deep");
  write(folder + "/sub/a", "planned");
  write(folder + "/sub/deep/x", "not planned");
  fs::create_symlink(at("outside"), folder + "/link");
  fs::create_hard_link(at("outside"), folder + "/hard");
  fs::create_directory_symlink(at("place"), folder + "/elsewhere");
  fs::create_directory(folder + "/file");
  write(folder + "/closed", "x");
  ::chmod((folder + "/closed").c_str(), 0400);
  ::mkfifo((folder + "/pipe").c_str(), 0600);
  const std::set<std::string> files = {"part", "sub/a",       "link", "hard",
                                       "pipe", "elsewhere/b", "file", "closed"};
  EXPECT_EQ(keep_only(storage_, folder, files), 7);
  std::set<std::string> left;
  for (const auto& entry : fs::recursive_directory_iterator(folder))
    left.insert(entry.path().lexically_relative(folder));
  EXPECT_EQ(left, (std::set<std::string>{"part", "sub", "sub/a"}));
  EXPECT_EQ(text_of(at("outside")), "mine");
  EXPECT_EQ(text_of(at("place/b")), "mine too");
}

TEST(HiddenName, IsKnownAgainAndSaysWhichMachineMadeIt) {
  const std::string names[] = {"global_step3", "x", "layer_1", std::string(255, 'n')};
  for (const std::string& name : names) {
    const std::string hidden = hidden_name(name);
    EXPECT_LE(hidden.size(), 255u);
    EXPECT_TRUE(is_hidden_name_of(name, hidden));
    EXPECT_FALSE(is_hidden_name_of(name, hidden + "0"));
    EXPECT_FALSE(is_hidden_name_of("y" + name, hidden));
    EXPECT_NE(hidden, hidden_name(name));
    EXPECT_TRUE(made_on_this_machine(hidden));
    std::string other = hidden;
    other.back() = other.back() == '0' ? '1' : '0';
    EXPECT_FALSE(made_on_this_machine(other));
  }
}

}  // namespace
}  // namespace isoshard::checkpoint
