// What is synced stays, what is not is lost as each model says.
#include "checkpoint/volatile_storage.h"

#include <gtest/gtest.h>

#include <set>

#include "checkpoint/hidden_name.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

std::string filled(char byte, size_t size_bytes) { return std::string(size_bytes, byte); }

void write(WritableFile* file, int64_t offset, const std::string& text) {
  file->write_at(offset, std::as_bytes(std::span(text)));
}

std::string read(Storage& storage, const std::string& path) {
  return storage.is_file(path) ? read_small_file(storage, path, 1 << 20) : "none";
}

// What a file holds after each of many power losses.
std::set<std::string> outcomes(const VolatileStorage& storage, Durability model,
                               const std::string& path) {
  std::set<std::string> found;
  for (uint64_t seed = 0; seed < 256; ++seed) {
    found.insert(read(*storage.after_crash(model, seed), path));
  }
  return found;
}

using Texts = std::set<std::string>;

// A durable file of 1024 times 'a' that is written over by 'b' and not synced.
class Overwritten : public testing::Test {
 protected:
  Overwritten() {
    const auto file = storage_.create("/file");
    write(file.get(), 0, filled('a', 1024));
    file->sync();
    file->close();
    storage_.sync_directory("/");
    open_ = storage_.open_write("/file");
    write(open_.get(), 0, filled('b', 1536));
  }
  VolatileStorage storage_;
  std::unique_ptr<WritableFile> open_;
};

TEST_F(Overwritten, TheDeadProgramHasWrittenAll) {
  EXPECT_EQ(outcomes(storage_, Durability::kEverything, "/file"), Texts{filled('b', 1536)});
  EXPECT_EQ(read(storage_, "/file"), filled('b', 1536));
}

TEST_F(Overwritten, UnsyncedBytesAreLost) {
  for (const Durability model : {Durability::kNoData, Durability::kReordered}) {
    EXPECT_EQ(outcomes(storage_, model, "/file"), Texts{filled('a', 1024)});
  }
}

TEST_F(Overwritten, LostBlocksAreOldOrZeros) {
  const Texts found = outcomes(storage_, Durability::kLostBlocks, "/file");
  EXPECT_EQ(found.size(), 8u);  // each of three blocks; all of them together at 4096 bytes
  EXPECT_TRUE(found.contains(filled('a', 1024) + filled('\0', 512)));
  EXPECT_TRUE(found.contains(filled('b', 512) + filled('a', 512) + filled('b', 512)));
}

TEST_F(Overwritten, ATornWriteEndsAtASector) {
  EXPECT_EQ(outcomes(storage_, Durability::kTornWrite, "/file"),
            (Texts{filled('a', 1024), filled('b', 512) + filled('a', 512), filled('b', 1024),
                   filled('b', 1536)}));
}

TEST_F(Overwritten, GarbageIsAnything) {
  const Texts found = outcomes(storage_, Durability::kGarbage, "/file");
  EXPECT_GT(found.size(), 50u);
  for (const std::string& text : found) EXPECT_EQ(text.size(), 1536u);
}

TEST_F(Overwritten, WhatIsSyncedStays) {
  open_->sync();
  open_->close();
  for (const Durability model : kDurabilities) {
    EXPECT_EQ(outcomes(storage_, model, "/file"), Texts{filled('b', 1536)}) << name(model);
  }
}

TEST(VolatileStorage, ANameIsLostUntilItsFolderIsSynced) {
  VolatileStorage storage;
  const auto file = storage.create("/file");
  write(file.get(), 0, "text");
  file->sync();
  EXPECT_EQ(outcomes(storage, Durability::kLostEntries, "/file"), Texts{"none"});
  EXPECT_EQ(outcomes(storage, Durability::kReordered, "/file"), (Texts{"none", "text"}));
  storage.sync_directory("/");
  for (const Durability model : kDurabilities) {
    EXPECT_EQ(outcomes(storage, model, "/file"), Texts{"text"}) << name(model);
  }
}

TEST(VolatileStorage, ARenameMayBeDurableBeforeTheData) {
  VolatileStorage storage;
  const auto file = storage.create("/new");
  write(file.get(), 0, "text");
  storage.rename_over("/new", "/final");
  EXPECT_EQ(outcomes(storage, Durability::kReordered, "/final"), (Texts{"none", ""}));
  EXPECT_EQ(outcomes(storage, Durability::kNoData, "/final"), Texts{""});
}

// Never under two names, never under none: a rename is one step, and what it builds on comes first.
TEST(VolatileStorage, RenamesAreWhole) {
  VolatileStorage storage;
  storage.make_directory("/a");
  storage.make_directory("/b");
  storage.create("/a/file");
  storage.begin_log();
  storage.rename_over("/a/file", "/b/file");
  storage.rename_over("/b/file", "/b/other");
  storage.exchange("/a", "/b");
  for (uint64_t seed = 0; seed < 256; ++seed) {
    const auto found = storage.after_crash(Durability::kReordered, seed);
    EXPECT_EQ(found->list("/a").size() + found->list("/b").size(), 1u) << seed;
  }
  storage.sync_directory("/a");  // which was /b, and is again
  EXPECT_EQ(outcomes(storage, Durability::kLostEntries, "/b/other"), Texts{""});
  storage.sync_everything("/");
  EXPECT_EQ(outcomes(storage, Durability::kLostEntries, "/a/other"), Texts{""});
}

TEST(VolatileStorage, TheLogIsTheHistory) {
  VolatileStorage storage;
  storage.make_directories("/a/b");
  storage.begin_log();
  const auto file = storage.create("/a/b/file");
  write(file.get(), 3, "text");
  file->set_size(5);
  file->sync();
  file->close();
  storage.make_directories("/a/c/d");
  storage.remove_tree("/a");
  EXPECT_EQ(storage.log().size(), 11u);  // of a tree, what lies inside goes first, one by one
  VolatileDisk disk = storage.base();
  Texts found;
  for (const DiskOperation& operation : storage.log()) {
    disk.apply(operation);
    found.insert(read(*disk.after_crash({}), "/a/b/file"));
  }
  EXPECT_EQ(found, (Texts{"", std::string("\0\0\0text", 7), std::string("\0\0\0te", 5), "none"}));
  EXPECT_TRUE(storage.after_crash(Durability::kEverything, 0)->list("/").empty());
}

TEST(VolatileStorage, HashesAreOfShownNames) {
  const auto all = [](const std::string&) { return true; };
  const auto some = [](const std::string& name) { return name != "hidden"; };
  VolatileStorage storage;
  storage.create("/file");
  const VolatileDisk before = [&] {
    storage.begin_log();
    return storage.base();
  }();
  write(storage.create("/hidden").get(), 0, "text");
  storage.begin_log();
  EXPECT_NE(before.hash_after({}, all), storage.base().hash_after({}, all));
  const uint64_t hidden = storage.base().hash_after({}, some);
  EXPECT_NE(before.hash_after({}, some), hidden) << "its name is seen";
  write(storage.open_write("/hidden").get(), 0, "other");
  storage.begin_log();
  EXPECT_EQ(storage.base().hash_after({}, some), hidden) << "what it holds is not";
}

TEST(VolatileStorage, HashesAreOfHiddenNamesWithoutTheirNonces) {
  const auto shown = [](const std::string& name) { return !name.starts_with("."); };
  const auto hash_with = [&](const std::string& name) {
    VolatileStorage storage;
    storage.create("/" + name);
    storage.begin_log();
    return storage.base().hash_after({}, shown);
  };
  const uint64_t one = hash_with(hidden_name("a"));
  EXPECT_EQ(hash_with(hidden_name("a")), one);
  EXPECT_NE(hash_with(hidden_name("b")), one);
  EXPECT_NE(hash_with(".a.isoshard-0123"), one) << "not known as a leftover";
}

TEST(VolatileStorage, FoldersStayWhereTheyCannotBeRenamed) {
  VolatileStorage storage;
  storage.renames_folders = false;
  storage.make_directory("/a");
  storage.create("/file")->close();
  EXPECT_THROW(storage.rename_if_absent("/a", "/b"), Error);
  EXPECT_THROW(storage.exchange("/a", "/file"), Error);
  EXPECT_TRUE(storage.rename_if_absent("/file", "/other"));
  EXPECT_TRUE(storage.is_directory("/a"));
}

}  // namespace
}  // namespace isoshard::checkpoint
