// The storage in memory keeps the contract of Storage and the codes of the real one.
#include "checkpoint/memory_storage.h"

#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <thread>

#include "core/check.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

ErrorCode code_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.info().code;
  }
  ADD_FAILURE() << "no Error was thrown";
  return ErrorCode::kUsage;
}

void write(Storage& storage, const std::string& path, const std::string& text) {
  const auto file = storage.create(path);
  file->write_at(0, std::as_bytes(std::span(text)));
  file->sync();
  file->close();
}

std::string read(Storage& storage, const std::string& path) {
  return read_small_file(storage, path, 1 << 20);
}

TEST(MemoryStorage, WhatIsWrittenIsReadAndGapsAreZeros) {
  MemoryStorage storage;
  const auto file = storage.create("a");
  const std::string text = "cd";
  file->write_at(2, std::as_bytes(std::span(text)));
  file->set_size(5);
  file->close();
  EXPECT_EQ(read(storage, "/a"), std::string("\0\0cd\0", 5));
  EXPECT_THROW(file->close(), CheckFailure);
  const auto reader = storage.open_read("./a");
  EXPECT_EQ(reader->next_data(1), 1);
  EXPECT_EQ(reader->next_hole(1), 5);
}

TEST(MemoryStorage, TheErrorCodesAreThoseOfTheRealOne) {
  MemoryStorage storage;
  storage.make_directory("d");
  write(storage, "d/a", "1234");
  EXPECT_EQ(code_of([&] { storage.create("d/a"); }), ErrorCode::kExists);
  EXPECT_EQ(code_of([&] { storage.create("none/a"); }), ErrorCode::kNotFound);
  EXPECT_EQ(code_of([&] { storage.open_write("none"); }), ErrorCode::kNotFound);
  EXPECT_EQ(code_of([&] { storage.open_read("d"); }), ErrorCode::kUnreadable);
  EXPECT_EQ(code_of([&] { storage.list("d/a"); }), ErrorCode::kUnreadable);
  EXPECT_EQ(code_of([&] { storage.make_directory("d"); }), ErrorCode::kExists);
  EXPECT_EQ(code_of([&] { storage.make_directories("d/a/b"); }), ErrorCode::kUnreadable);
  EXPECT_EQ(code_of([&] { storage.remove_file("d"); }), ErrorCode::kUnreadable);
  EXPECT_EQ(code_of([&] { storage.remove_tree("none"); }), ErrorCode::kNotFound);
  EXPECT_EQ(code_of([&] { storage.rename_if_absent("d", "d/e"); }), ErrorCode::kUnreadable);
  const auto file = storage.open_read("d/a");
  std::byte target[4];
  EXPECT_EQ(code_of([&] { file->read_at(1, target); }), ErrorCode::kCorrupt);
}

TEST(MemoryStorage, AListIsSortedAndOneLevelDeep) {
  MemoryStorage storage;
  storage.make_directories("x/b/c");
  write(storage, "x/a", "12");
  write(storage, "x/b/hidden", "");
  const std::vector<DirectoryEntry> entries = storage.list("x/");
  ASSERT_EQ(entries.size(), 2u);
  EXPECT_EQ(entries[0].name, "a");
  EXPECT_EQ(entries[0].size_bytes, 2);
  EXPECT_EQ(entries[1].name, "b");
  EXPECT_EQ(entries[1].kind, DirectoryEntry::Kind::kDirectory);
  EXPECT_EQ(storage.list("/").size(), 1u);
}

TEST(MemoryStorage, AFolderMovesWithAllItHolds) {
  MemoryStorage storage;
  storage.make_directories("x/b");
  write(storage, "x/b/f", "text");
  write(storage, "x.side", "");  // begins like the folder, and is not inside it
  EXPECT_TRUE(storage.rename_if_absent("x", "y"));
  EXPECT_FALSE(storage.is_directory("x"));
  EXPECT_EQ(read(storage, "y/b/f"), "text");
  EXPECT_TRUE(storage.is_file("x.side"));
  storage.make_directory("x");
  EXPECT_FALSE(storage.rename_if_absent("x", "y"));
  storage.exchange("x", "y");
  EXPECT_TRUE(storage.is_file("x/b/f"));
  EXPECT_TRUE(storage.list("y").empty());
  storage.remove_tree("x");
  EXPECT_FALSE(storage.is_file("x/b/f"));
}

TEST(MemoryStorage, RenameOverReplacesFilesAndEmptyFoldersOnly) {
  MemoryStorage storage;
  write(storage, "a", "a");
  write(storage, "b", "b");
  storage.rename_over("a", "b");
  EXPECT_EQ(read(storage, "b"), "a");
  storage.make_directories("full/x");
  storage.make_directory("d");
  EXPECT_EQ(code_of([&] { storage.rename_over("d", "full"); }), ErrorCode::kExists);
  EXPECT_EQ(code_of([&] { storage.rename_over("b", "d"); }), ErrorCode::kUnreadable);
  storage.rename_over("full", "d");
  EXPECT_TRUE(storage.is_directory("d/x"));
}

TEST(MemoryStorage, AnOpenFileOutlivesItsNameAndTheStorage) {
  auto storage = std::make_unique<MemoryStorage>();
  write(*storage, "a", "text");
  const auto file = storage->open_read("a");
  storage->remove_file("a");
  EXPECT_FALSE(storage->is_file("a"));
  storage.reset();
  std::byte target[4];
  file->read_at(0, target);
  EXPECT_EQ(static_cast<char>(target[0]), 't');
}

TEST(MemoryStorage, CanonicalResolvesDots) {
  MemoryStorage storage;
  EXPECT_EQ(storage.canonical("a//./b/../c/"), "/a/c");
  EXPECT_EQ(storage.canonical("../.."), "/");
}

TEST(MemoryStorage, ThreadsMayWriteDisjointRanges) {
  MemoryStorage storage;
  const auto file = storage.create("a");
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      const std::string text(100, static_cast<char>('a' + i));
      file->write_at(100 * i, std::as_bytes(std::span(text)));
      write(storage, "own" + std::to_string(i), text);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(read(storage, "a").substr(99, 2), "ab");
  EXPECT_EQ(storage.list("/").size(), 5u);
}

}  // namespace
}  // namespace isoshard::checkpoint
