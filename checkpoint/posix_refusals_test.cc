// What the real disk's storage does where the kernel refuses a call: another way where there is
// one, else one error that names the operation and the path. Each case runs in a process of its
// own, in which the kernel refuses that call.
#include <errno.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <string>

#include "checkpoint/failing_call.h"
#include "checkpoint/folder_lock.h"
#include "checkpoint/real_folder_case.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

namespace fs = std::filesystem;

constexpr int kNoFilter = 77;

class PosixRefusals : public testing::Test, protected RealFolder {
 protected:
  void SetUp() override {
    // The parts of a test must share nothing with threads of others.
    testing::FLAGS_gtest_death_test_style = "fast";
    fs::create_directories(at("folder/inner"));
    std::ofstream(at("folder/inner/file")) << "some bytes";
    std::ofstream(at("file")) << "other bytes";
  }

  // Runs the work where the call fails; prints how it ended: "done: " and its answer, or the error.
  [[noreturn]] void run(long number, int error, const std::function<std::string()>& work) {
    if (!fail_call(number, error)) std::exit(kNoFilter);
    try {
      std::cerr << "done: " << work() << "\n";
    } catch (const Error& refused) {
      const ErrorInfo& info = refused.info();
      std::cerr << "error: " << info.what << " [" << fs::path(info.file).filename().string() << "] "
                << info.found << "; " << info.next << "\n";
    }
    std::exit(0);
  }
};

bool ended(int status) {
  if (WIFEXITED(status) && WEXITSTATUS(status) == kNoFilter) {
    std::cerr << "the kernel takes no filter of system calls here: not tested\n";
    return true;
  }
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// A message that is expected, or that nothing could be tested.
std::string expected(const std::string& text) { return text + "|^$"; }

std::string word(bool yes) { return yes ? "yes" : "no"; }

TEST_F(PosixRefusals, AFolderIsRenamedOntoAReservedName) {
  EXPECT_EXIT(run(SYS_renameat2, EINVAL,
                  [&] {
                    const bool done = storage_.rename_if_absent(at("folder"), at("new"));
                    return word(done) + word(fs::exists(at("new/inner/file"))) +
                           word(fs::exists(at("folder")));
                  }),
              ended, expected("done: yesyesno"));
}

TEST_F(PosixRefusals, AReservedNameIsNeverTakenFromSomebodyElse) {
  fs::create_directories(at("new"));
  EXPECT_EXIT(run(SYS_renameat2, ENOSYS,
                  [&] {
                    const bool folder = storage_.rename_if_absent(at("folder"), at("new"));
                    const bool file =
                        storage_.rename_if_absent(at("file"), at("folder/inner/file"));
                    return word(folder) + word(file) + word(fs::exists(at("folder/inner/file"))) +
                           word(fs::is_empty(at("new")));
                  }),
              ended, expected("done: nonoyesyes"));
}

TEST_F(PosixRefusals, AFileIsRenamedByASecondLink) {
  EXPECT_EXIT(run(SYS_renameat2, ENOTSUP,
                  [&] {
                    const bool done = storage_.rename_if_absent(at("file"), at("new"));
                    return word(done) + word(fs::file_size(at("new")) == 11) +
                           word(fs::exists(at("file")));
                  }),
              ended, expected("done: yesyesno"));
}

// Both ways of renaming fail: the reserved name is given back, and the call that failed is told.
TEST_F(PosixRefusals, AReservedNameIsGivenBackWhereRenamingFails) {
  const auto work = [&] { return word(storage_.rename_if_absent(at("folder"), at("new"))); };
  EXPECT_EXIT(
      {
        if (!fail_call(SYS_renameat2, EINVAL)) std::exit(kNoFilter);
        run(SYS_rename, EXDEV, work);
      },
      ended, expected("error: Renaming failed.*\\[new\\] errno 18, EXDEV"));
  EXPECT_FALSE(fs::exists(at("new")));
  EXPECT_EXIT(
      {
        if (!fail_call(SYS_renameat2, EINVAL)) std::exit(kNoFilter);
        run(SYS_mkdir, EROFS, work);
      },
      ended, expected("error: Reserving the name failed.*\\[new\\] errno 30, EROFS"));
  EXPECT_EXIT(
      {
        if (!fail_call(SYS_renameat2, EINVAL)) std::exit(kNoFilter);
        run(SYS_link, EPERM,
            [&] { return word(storage_.rename_if_absent(at("file"), at("new"))); });
      },
      ended, expected("error: Renaming \\(by a second link\\) failed.*\\[new\\] errno 1, EPERM"));
  EXPECT_TRUE(fs::exists(at("file")));
  EXPECT_TRUE(fs::exists(at("folder/inner/file")));
}

TEST_F(PosixRefusals, NoLocksAreNotALockThatFails) {
  const auto lock = [&] {
    return word(lock_folder(storage_, at("folder")).state == LockAnswer::State::kUnknown);
  };
  EXPECT_EXIT(run(SYS_flock, EOPNOTSUPP, lock), ended, expected("done: yes"));
  EXPECT_EXIT(run(SYS_flock, EIO, lock), ended,
              expected("error: Locking the folder failed.*\\[folder\\] errno 5, EIO"));
}

TEST_F(PosixRefusals, WhatIsNotThereCannotBeRenamed) {
  EXPECT_EXIT(run(SYS_renameat2, EINVAL,
                  [&] { return word(storage_.rename_if_absent(at("none"), at("new"))); }),
              ended, expected("error: Renaming failed.*\\[none\\] errno 2, ENOENT"));
}

TEST_F(PosixRefusals, NamesThatCannotBeExchangedAreTold) {
  EXPECT_EXIT(run(SYS_renameat2, EINVAL,
                  [&] {
                    storage_.exchange(at("folder"), at("folder/inner"));
                    return std::string();
                  }),
              ended, expected("error: This file system cannot exchange.*move the old one away"));
  EXPECT_EXIT(run(SYS_renameat2, EROFS,
                  [&] {
                    storage_.exchange(at("folder"), at("folder/inner"));
                    return std::string();
                  }),
              ended, expected("error: Exchanging two names failed.*\\[inner\\].*EROFS"));
}

struct Refusal {
  const char* name;
  long number;
  int error;
  std::function<void(PosixStorage&, const std::string& root)> work;
  const char* message;
};

void PrintTo(const Refusal& refusal, std::ostream* out) { *out << refusal.name; }

class PosixRefusal : public PosixRefusals, public testing::WithParamInterface<Refusal> {};

TEST_P(PosixRefusal, NamesTheOperationAndThePath) {
  EXPECT_EXIT(run(GetParam().number, GetParam().error,
                  [&] {
                    GetParam().work(storage_, root_);
                    return std::string();
                  }),
              ended, expected(std::string("error: ") + GetParam().message));
  EXPECT_TRUE(fs::exists(at("folder"))) << "a refused call has lost something";
}

const Refusal kRefusals[] = {
    {"RenameReadOnly", SYS_renameat2, EROFS,
     [](PosixStorage& storage, const std::string& root) {
       storage.rename_if_absent(root + "/folder", root + "/new");
     },
     "Renaming failed.*\\[new\\].*EROFS"},
    {"RenameOver", SYS_rename, EXDEV,
     [](PosixStorage& storage, const std::string& root) {
       storage.rename_over(root + "/file", root + "/new");
     },
     "Renaming failed: the two names lie on different file systems.*\\[new\\].*EXDEV"},
    {"MakeFolder", SYS_mkdir, ENOSPC,
     [](PosixStorage& storage, const std::string& root) { storage.make_directory(root + "/x"); },
     "Making the folder failed.*\\[x\\].*ENOSPC.*bytes free"},
    {"MakeFolders", SYS_mkdir, EACCES,
     [](PosixStorage& storage, const std::string& root) {
       storage.make_directories(root + "/x/y");
     },
     "Making the folder failed.*\\[x\\].*EACCES"},
    {"RemoveFile", SYS_unlink, EPERM,
     [](PosixStorage& storage, const std::string& root) { storage.remove_file(root + "/file"); },
     "Removing the file failed.*\\[file\\].*EPERM"},
    {"RemoveTree", SYS_unlinkat, EACCES,
     [](PosixStorage& storage, const std::string& root) { storage.remove_tree(root + "/folder"); },
     "Removing a file of the folder failed.*\\[folder\\].*EACCES"},
    {"SyncFolder", SYS_fsync, EIO,
     [](PosixStorage& storage, const std::string& root) { storage.sync_directory(root); },
     "Making the folder durable \\(fsync\\) failed.*EIO"},
    {"SyncEverything", SYS_syncfs, EIO,
     [](PosixStorage& storage, const std::string& root) { storage.sync_everything(root); },
     "Making the file system durable \\(syncfs\\) failed.*EIO"},
    {"DropCache", SYS_fsync, EIO,
     [](PosixStorage& storage, const std::string& root) { storage.drop_cache(root + "/file"); },
     "Making the file durable failed.*\\[file\\].*EIO"},
    {"WriteNothing", SYS_pwrite64, EDQUOT,
     [](PosixStorage& storage, const std::string& root) {
       const char byte = 1;
       storage.create(root + "/new")->write_at(0, std::as_bytes(std::span(&byte, 1)));
     },
     "Writing to the file failed.*\\[new\\].*EDQUOT.*the quota allows fewer"},
    {"SetSize", SYS_ftruncate, EFBIG,
     [](PosixStorage& storage, const std::string& root) {
       storage.create(root + "/new")->set_size(10);
     },
     "Setting the size of the file failed.*\\[new\\].*EFBIG"},
    {"Close", SYS_close, EIO,
     [](PosixStorage& storage, const std::string& root) { storage.create(root + "/new")->close(); },
     "Closing the file failed.*\\[new\\].*EIO"},
    {"Read", SYS_pread64, EIO,
     [](PosixStorage& storage, const std::string& root) {
       read_small_file(storage, root + "/file", 100);
     },
     "Reading from the file failed.*\\[file\\].*EIO"},
    {"UnknownError", SYS_rename, 500,
     [](PosixStorage& storage, const std::string& root) {
       storage.rename_over(root + "/file", root + "/new");
     },
     "Renaming failed: error 500.*errno 500; look into the kernel log"},
    {"FreeSpace", SYS_statfs, EIO,
     [](PosixStorage& storage, const std::string& root) { storage.free_space(root); },
     "Asking for the free space failed.*EIO"},
};

INSTANTIATE_TEST_SUITE_P(Calls, PosixRefusal, testing::ValuesIn(kRefusals),
                         [](const auto& each) { return std::string(each.param.name); });

TEST_F(PosixRefusals, AStaleHandleIsLookedUpAgainAFewTimesAndThenTold) {
  EXPECT_EXIT(run(SYS_openat, ESTALE,
                  [&] {
                    storage_.open_read(at("file"));
                    return std::string();
                  }),
              ended, expected("error: .*\\[file\\].*ESTALE"));
}

TEST_F(PosixRefusals, WhereHolesAreNotToldEverythingIsData) {
  EXPECT_EXIT(run(SYS_lseek, EINVAL,
                  [&] {
                    const auto file = storage_.open_read(at("file"));
                    return std::to_string(file->next_data(3)) + " " +
                           std::to_string(file->next_hole(3));
                  }),
              ended, expected("done: 3 11"));
  EXPECT_EXIT(run(SYS_lseek, EIO,
                  [&] { return std::to_string(storage_.open_read(at("file"))->next_data(3)); }),
              ended, expected("error: Looking for data in the file failed.*\\[file\\].*EIO"));
}

// A folder without the right to look inside keeps even its owner out; not the superuser.
TEST_F(PosixRefusals, ATreeIsRemovedWhereTheOwnerMayChangeItsRights) {
  fs::permissions(at("folder/inner"), fs::perms::none);
  storage_.remove_tree(at("folder"));
  EXPECT_FALSE(fs::exists(at("folder")));
}

TEST_F(PosixRefusals, AFolderThatMayNotBeOpenedIsNamed) {
  EXPECT_EXIT(run(SYS_openat, EACCES,
                  [&] {
                    storage_.remove_tree(at("folder"));
                    return std::string();
                  }),
              ended, expected("error: Removing the folder failed.*\\[folder\\].*EACCES"));
}

}  // namespace
}  // namespace isoshard::checkpoint
