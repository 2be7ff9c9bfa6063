// Facts about the real disk, and about the messages when it refuses.
#include "checkpoint/posix_storage.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>

#include "checkpoint/real_folder_case.h"
#include "core/check.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

namespace fs = std::filesystem;

std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text));
}

class PosixStorageTest : public testing::Test, protected RealFolder {
 protected:
  void write(const std::string& name, const std::string& text) {
    std::ofstream(at(name), std::ios::binary) << text;
  }

  std::string read(const std::string& name) { return read_small_file(storage_, at(name), 1 << 20); }

  // Of this process's open file; -1 where /proc does not say.
  int descriptor_of(const std::string& name) const {
    for (int i = 3; i < 1024; ++i) {
      std::error_code ignored;
      const fs::path link = "/proc/self/fd/" + std::to_string(i);
      if (fs::read_symlink(link, ignored) == fs::path(at(name))) return i;
    }
    return -1;
  }
};

TEST_F(PosixStorageTest, WhatIsWrittenIsRead) {
  const auto file = storage_.create(at("a"));
  file->write_at(2, bytes_of("cd"));
  file->write_at(0, bytes_of("ab"));
  file->sync();
  file->close();
  EXPECT_EQ(read("a"), "abcd");
  const auto again = storage_.open_write(at("a"));
  again->write_at(1, bytes_of("X"));
  again->close();
  EXPECT_EQ(read("a"), "aXcd");
  EXPECT_THROW(again->close(), CheckFailure);
}

TEST_F(PosixStorageTest, CreateRefusesAnExistingFileAndOpenWriteAMissingOne) {
  write("a", "x");
  EXPECT_EQ(error_of([&] { storage_.create(at("a")); }).code, ErrorCode::kExists);
  EXPECT_EQ(error_of([&] { storage_.open_write(at("b")); }).code, ErrorCode::kNotFound);
}

TEST_F(PosixStorageTest, ReadingAFifoIsRefusedAtOnce) {
  ASSERT_EQ(::mkfifo(at("pipe").c_str(), 0600), 0);
  const ErrorInfo info = error_of([&] { storage_.open_read(at("pipe")); });
  EXPECT_EQ(info.code, ErrorCode::kHostile);
  EXPECT_EQ(info.found, "a named pipe");
  EXPECT_EQ(info.file, at("pipe"));
  EXPECT_EQ(error_of([&] { storage_.open_write(at("pipe")); }).code, ErrorCode::kHostile);
}

TEST_F(PosixStorageTest, ReadingADeviceOrASocketIsRefused) {
  EXPECT_EQ(error_of([&] { storage_.open_read("/dev/zero"); }).found, "a device");
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  at("s").copy(address.sun_path, sizeof address.sun_path - 1);
  const int number = ::socket(AF_UNIX, SOCK_STREAM, 0);
  ASSERT_EQ(::bind(number, reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  EXPECT_EQ(error_of([&] { storage_.open_read(at("s")); }).found, "a socket");
  ::close(number);
}

TEST_F(PosixStorageTest, AFolderIsNotReadAsAFile) {
  const ErrorInfo info = error_of([&] { storage_.open_read(root_); });
  EXPECT_EQ(info.code, ErrorCode::kUnreadable);
  EXPECT_EQ(info.what, "Opening the file failed: it is a folder, not a file.");
}

TEST_F(PosixStorageTest, LinksToFilesAreReadAndNeverWritten) {
  write("a", "text");
  fs::create_symlink("a", at("link"));
  fs::create_symlink("nowhere", at("dangling"));
  EXPECT_EQ(read("link"), "text");
  EXPECT_TRUE(storage_.is_file(at("link")));
  EXPECT_NE(error_of([&] { storage_.open_write(at("link")); }).what.find("symbolic link"),
            std::string::npos);
  EXPECT_EQ(error_of([&] { storage_.create(at("dangling")); }).code, ErrorCode::kExists);
  EXPECT_FALSE(fs::exists(at("nowhere")));
}

TEST_F(PosixStorageTest, TruncationWhileReadingIsReportedWithBothSizes) {
  write("a", std::string(100, 'x'));
  const auto file = storage_.open_read(at("a"));
  fs::resize_file(at("a"), 40);
  std::string target(60, '\0');
  const auto read = [&] { file->read_at(10, std::as_writable_bytes(std::span(target))); };
  const ErrorInfo info = error_of(read);
  EXPECT_EQ(info.code, ErrorCode::kCorrupt);
  EXPECT_EQ(info.what, "The file was changed while it was read.");
  EXPECT_EQ(info.expected, "at least 70 bytes");
  EXPECT_EQ(info.found, "40 bytes");
}

TEST_F(PosixStorageTest, ReadingPastTheEndIsReportedWithBothSizes) {
  write("a", "1234");
  const auto file = storage_.open_read(at("a"));
  std::string target(3, '\0');
  const auto read = [&] { file->read_at(2, std::as_writable_bytes(std::span(target))); };
  const ErrorInfo info = error_of(read);
  EXPECT_EQ(info.code, ErrorCode::kCorrupt);
  EXPECT_EQ(info.expected, "at least 5 bytes");
  EXPECT_EQ(info.found, "4 bytes");
}

TEST_F(PosixStorageTest, HolesReadAsZerosAndAreFoundWhereTheFileSystemTells) {
  constexpr int64_t kMiB = 1 << 20;
  const auto file = storage_.create(at("a"));
  file->set_size(3 * kMiB);
  file->write_at(kMiB, bytes_of("data"));
  file->close();
  const auto reader = storage_.open_read(at("a"));
  ASSERT_EQ(reader->size_bytes(), 3 * kMiB);
  const int64_t data = reader->next_data(0);
  const int64_t hole = reader->next_hole(data);
  EXPECT_LE(data, kMiB);
  EXPECT_GE(hole, kMiB + 4);
  EXPECT_EQ(reader->next_data(3 * kMiB), 3 * kMiB);
  EXPECT_EQ(reader->next_hole(3 * kMiB), 3 * kMiB);
  if (data == kMiB) {
    EXPECT_EQ(reader->next_hole(0), hole);  // the hole at 0 itself does not count
    EXPECT_EQ(reader->next_data(hole), 3 * kMiB);
  }
  std::string head(16, 'x');
  reader->read_at(kMiB - 16, std::as_writable_bytes(std::span(head)));
  EXPECT_EQ(head, std::string(16, '\0'));
}

TEST_F(PosixStorageTest, ATruncatedTailIsNotTakenForAHole) {
  write("a", std::string(100000, 'x'));
  const auto file = storage_.open_read(at("a"));
  fs::resize_file(at("a"), 10);
  const auto read = [&] {
    // Where the file system knows no holes, reading is what finds the loss; what is said to hold no
    // data is never read.
    std::byte target[1];
    const int64_t data = file->next_data(5000);
    if (data < file->size_bytes()) file->read_at(data, target);
  };
  EXPECT_EQ(error_of(read).code, ErrorCode::kCorrupt);
}

TEST_F(PosixStorageTest, AListIsSortedAndFollowsLinksToFilesOnly) {
  write("b", "12");
  write("a", "1");
  fs::create_directory(at("d"));
  fs::create_symlink("b", at("to_file"));
  fs::create_symlink("d", at("to_folder"));
  fs::create_symlink("nowhere", at("to_nothing"));
  ASSERT_EQ(::mkfifo(at("pipe").c_str(), 0600), 0);
  std::string seen;
  for (const DirectoryEntry& entry : storage_.list(root_)) {
    const char* kind = entry.kind == DirectoryEntry::Kind::kFile        ? "file"
                       : entry.kind == DirectoryEntry::Kind::kDirectory ? "folder"
                                                                        : "other";
    seen += entry.name + ":" + kind + ":" + std::to_string(entry.size_bytes) + " ";
  }
  EXPECT_EQ(seen,
            "a:file:1 b:file:2 d:folder:0 pipe:other:0 to_file:file:2 to_folder:other:0 "
            "to_nothing:other:0 ");
  EXPECT_EQ(error_of([&] { storage_.list(at("none")); }).code, ErrorCode::kNotFound);
  EXPECT_EQ(error_of([&] { storage_.list(at("a")); }).code, ErrorCode::kUnreadable);
}

TEST_F(PosixStorageTest, WhatIsAbsentIsNeitherFileNorFolder) {
  write("a", "x");
  EXPECT_FALSE(storage_.is_file(at("none")));
  EXPECT_FALSE(storage_.is_file(at("a/below")));
  EXPECT_FALSE(storage_.is_directory(at("a")));
  EXPECT_TRUE(storage_.is_directory(root_));
}

TEST_F(PosixStorageTest, FoldersAreMadeWithTheirParents) {
  storage_.make_directories(at("x/y/z/"));
  storage_.make_directories(at("x/y/z"));
  EXPECT_TRUE(storage_.is_directory(at("x/y/z")));
  write("file", "x");
  EXPECT_EQ(error_of([&] { storage_.make_directories(at("file/a")); }).code,
            ErrorCode::kUnreadable);
  EXPECT_EQ(error_of([&] { storage_.make_directory(at("x")); }).code, ErrorCode::kExists);
  EXPECT_EQ(error_of([&] { storage_.make_directory(at("n/m")); }).code, ErrorCode::kNotFound);
}

TEST_F(PosixStorageTest, RenamingNeverReplacesUnlessAsked) {
  for (const char* name : {"a", "b"}) write(name, name);
  for (const char* name : {"d", "e"}) fs::create_directory(at(name));
  EXPECT_FALSE(storage_.rename_if_absent(at("a"), at("b")));
  EXPECT_FALSE(storage_.rename_if_absent(at("d"), at("e")));
  EXPECT_EQ(read("b"), "b");
  EXPECT_TRUE(storage_.rename_if_absent(at("a"), at("c")));
  EXPECT_TRUE(storage_.rename_if_absent(at("d"), at("f")));
  EXPECT_TRUE(storage_.is_directory(at("f")));
  EXPECT_FALSE(storage_.is_directory(at("d")));
  storage_.rename_over(at("c"), at("b"));
  EXPECT_EQ(read("b"), "a");
  EXPECT_EQ(error_of([&] { storage_.rename_if_absent(at("gone"), at("x")); }).code,
            ErrorCode::kNotFound);
}

TEST_F(PosixStorageTest, ExchangeSwapsTwoFolders) {
  storage_.make_directories(at("a"));
  storage_.make_directories(at("b"));
  write("a/in_a", "");
  write("b/in_b", "");
  try {
    storage_.exchange(at("a"), at("b"));
  } catch (const Error& error) {
    if (error.info().code != ErrorCode::kUnsupported) throw;
    GTEST_SKIP() << "this file system cannot exchange two names";
  }
  EXPECT_TRUE(storage_.is_file(at("b/in_a")));
  EXPECT_TRUE(storage_.is_file(at("a/in_b")));
}

TEST_F(PosixStorageTest, ATreeIsRemovedWithoutFollowingLinks) {
  storage_.make_directories(at("outside"));
  write("outside/kept", "x");
  storage_.make_directories(at("tree/a/b/c"));
  storage_.make_directories(at("tree/d"));
  write("tree/a/b/file", "x");
  fs::create_directory_symlink(at("outside"), at("tree/a/link"));
  fs::create_directory_symlink(at("outside"), at("link"));
  ASSERT_EQ(::mkfifo(at("tree/pipe").c_str(), 0600), 0);
  storage_.remove_tree(at("tree"));
  storage_.remove_tree(at("link"));
  EXPECT_FALSE(fs::exists(at("tree")));
  EXPECT_FALSE(fs::exists(fs::symlink_status(at("link"))));
  EXPECT_EQ(read("outside/kept"), "x");
  EXPECT_EQ(error_of([&] { storage_.remove_tree(at("tree")); }).code, ErrorCode::kNotFound);
}

TEST_F(PosixStorageTest, ATreeWithReadOnlyFoldersIsRemoved) {
  storage_.make_directories(at("tree/a/b"));
  write("tree/a/file", "x");
  write("tree/a/b/file", "x");
  for (const char* name : {"tree/a/b", "tree/a", "tree"}) ::chmod(at(name).c_str(), 0500);
  storage_.remove_tree(at("tree"));
  EXPECT_FALSE(fs::exists(at("tree")));
}

TEST_F(PosixStorageTest, AManyLevelsDeepTreeIsRemoved) {
  std::string path = at("tree");
  for (int i = 0; i < 200; ++i) path += "/d";
  storage_.make_directories(path);
  storage_.remove_tree(at("tree"));
  EXPECT_FALSE(fs::exists(at("tree")));
}

TEST_F(PosixStorageTest, CanonicalResolvesWhatExistsAndKeepsTheRest) {
  storage_.make_directories(at("real/in"));
  fs::create_directory_symlink("real", at("link"));
  const std::string root = fs::canonical(root_).string();
  EXPECT_EQ(storage_.canonical(at("link/in/../new//x/./y/../z/")), root + "/real/new/x/z");
  EXPECT_EQ(storage_.canonical("no/such/thing"), fs::current_path().string() + "/no/such/thing");
  EXPECT_EQ(storage_.canonical("/"), "/");
  EXPECT_EQ(storage_.canonical(""), fs::current_path().string());
}

TEST_F(PosixStorageTest, FreeSpaceIsAskedForAPathThatDoesNotExistYet) {
  const FreeSpace space = storage_.free_space(at("not/yet"));
  EXPECT_GT(space.bytes, 0);
  EXPECT_NE(space.inodes, 0);
}

TEST_F(PosixStorageTest, EverythingCanBeSynced) {
  write("a", "x");
  storage_.sync_directory(root_);
  storage_.sync_everything(root_);
  EXPECT_EQ(error_of([&] { storage_.sync_directory(at("none")); }).code, ErrorCode::kNotFound);
}

TEST_F(PosixStorageTest, AFullDiskIsNamedWithNeededAndFreeBytes) {
  if (!fs::exists("/dev/full")) GTEST_SKIP() << "no /dev/full here";
  // A device is refused by open_write, so the descriptor of a file is made to lead to one.
  const auto file = storage_.create(at("a"));
  const int number = descriptor_of("a");
  const int device = ::open("/dev/full", O_WRONLY | O_CLOEXEC);
  if (device < 0 || number < 0) GTEST_SKIP() << "/dev/full or /proc cannot be used here";
  ASSERT_GE(::dup3(device, number, O_CLOEXEC), 0);
  ::close(device);
  const ErrorInfo info = error_of([&] { file->write_at(0, bytes_of("12345")); });
  EXPECT_EQ(info.code, ErrorCode::kNoSpace);
  EXPECT_EQ(info.what, "Writing to the file failed: no space left on device.");
  EXPECT_EQ(info.expected, "room for 5 more bytes");
  EXPECT_NE(info.found.find("bytes free"), std::string::npos);
}

// A limit of the process lets the first bytes through and refuses the rest.
TEST_F(PosixStorageTest, AWriteThatIsCutShortIsNotTakenForAWhole) {
  const auto file = storage_.create(at("a"));
  struct rlimit before {};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const struct rlimit small { 3, before.rlim_max };
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  const ErrorInfo info = error_of([&] { file->write_at(0, bytes_of("12345")); });
  ::setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(info.what, "Writing to the file failed: the file would be larger than allowed.");
  EXPECT_EQ(read("a"), "123");
}

TEST_F(PosixStorageTest, AnErrorOfCloseIsTold) {
  const auto file = storage_.create(at("a"));
  const int number = descriptor_of("a");
  if (number < 0) GTEST_SKIP() << "/proc cannot be used here";
  ::close(number);
  EXPECT_NE(error_of([&] { file->close(); }).what.find("Closing the file"), std::string::npos);
}

// The kernel tells a lost write once: the next fsync would seem to succeed.
TEST_F(PosixStorageTest, AFailedSyncStaysFailed) {
  const auto file = storage_.create(at("a"));
  const int number = descriptor_of("a");
  int pipe[2] = {-1, -1};
  if (number < 0 || ::pipe2(pipe, O_CLOEXEC) != 0) GTEST_SKIP() << "/proc cannot be used here";
  const int kept = ::fcntl(number, F_DUPFD_CLOEXEC, 3);
  ASSERT_GE(::dup3(pipe[1], number, O_CLOEXEC), 0);  // a pipe cannot be synced
  EXPECT_NE(error_of([&] { file->sync(); }).what.find("fsync"), std::string::npos);
  ASSERT_GE(::dup3(kept, number, O_CLOEXEC), 0);
  EXPECT_NE(error_of([&] { file->sync(); }).what.find("fsync"), std::string::npos);
  for (const int each : {pipe[0], pipe[1], kept}) ::close(each);
}

TEST_F(PosixStorageTest, AMissingPermissionIsNamed) {
  if (::geteuid() == 0) GTEST_SKIP() << "nothing is forbidden to the superuser";
  write("a", "x");
  ::chmod(at("a").c_str(), 0);
  const ErrorInfo info = error_of([&] { storage_.open_read(at("a")); });
  EXPECT_EQ(info.code, ErrorCode::kPermission);
  EXPECT_EQ(info.what, "Opening the file failed: permission denied.");
}

TEST_F(PosixStorageTest, ANulInAPathIsRefused) {
  const std::string path = at(std::string("a\0b", 3));
  EXPECT_EQ(error_of([&] { storage_.open_read(path); }).code, ErrorCode::kHostile);
  EXPECT_EQ(error_of([&] { storage_.is_file(path); }).code, ErrorCode::kHostile);
  EXPECT_EQ(error_of([&] { storage_.make_directories(path); }).code, ErrorCode::kHostile);
}

}  // namespace
}  // namespace isoshard::checkpoint
