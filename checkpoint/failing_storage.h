// FailingStorage: a way to a disk on which one call fails, or every call from one on, with an errno
// that the system call behind it can have. The message is the real disk's. What a failed call
// leaves behind is the worst that is allowed:
//
//   write    the first half has arrived            (EIO, ENOSPC, EDQUOT)
//   sync     the file, or everything, never becomes durable, though further syncs succeed, those of
//            everything too: the pages of a failed sync count as clean
//   close    what was written since the last sync is lost by half
//   removal  of a folder: part of what it holds is gone
//   others   nothing is done
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/storage.h"

namespace isoshard::checkpoint {

enum class StorageCall {
  kOpenRead,
  kRead,
  kCreate,
  kOpenWrite,
  kWrite,
  kSetSize,
  kSyncFile,
  kClose,
  kList,
  kLook,  // whether there is a file or folder
  kMakeFolder,
  kRename,
  kExchange,
  kRemoveFile,
  kRemoveTree,
  kSyncFolder,
  kSyncEverything,
  kDropCache,
  kFreeSpace,
  kResolve,
};

const char* name(StorageCall call);  // "write", "sync of a file"

// The errnos that the call's system calls are documented or known to report.
const std::vector<int>& errors_of(StorageCall call);

struct CallFault {
  int64_t at = -1;       // number of the call that fails, from 0; -1: none
  int error = 0;         // where this is no error of the call, it does not fail
  bool forever = false;  // every later call that can report `error` fails too
};

// Thread-safe where `base` is. `base` outlives the object, and the object the files it has opened.
class FailingStorage final : public Storage {
 public:
  // `on_failure` runs at the first failure, before the call does anything.
  FailingStorage(Storage& base, const CallFault& fault, std::function<void()> on_failure = {})
      : base_(base), fault_(fault), on_failure_(std::move(on_failure)) {}

  // That were made so far, and how many of them failed.
  const std::vector<StorageCall>& calls() const { return calls_; }
  int64_t failures() const { return failures_; }

  std::unique_ptr<ReadableFile> open_read(const std::string& path) override;
  std::unique_ptr<WritableFile> create(const std::string& path) override;
  std::unique_ptr<WritableFile> open_write(const std::string& path) override;
  std::vector<DirectoryEntry> list(const std::string& directory) override;
  bool is_file(const std::string& path) override;
  bool is_directory(const std::string& path) override;
  void make_directories(const std::string& path) override;
  void make_directory(const std::string& path) override;
  bool rename_if_absent(const std::string& from, const std::string& to) override;
  void rename_over(const std::string& from, const std::string& to) override;
  void exchange(const std::string& a, const std::string& b) override;
  void remove_file(const std::string& path) override;
  void remove_tree(const std::string& path) override;
  void sync_directory(const std::string& path) override;
  void sync_everything(const std::string& path) override;
  void drop_cache(const std::string& path) override;
  FreeSpace free_space(const std::string& path) override;
  std::string canonical(const std::string& path) override;

 private:
  friend class FailingReadFile;
  friend class FailingFile;

  // Counts the call; true where it is to fail.
  bool strikes(StorageCall call);
  // Counts the call, and throws where it is to fail, behind what it leaves done.
  void pass(StorageCall call, const char* operation, const std::string& path,
            const std::function<void()>& half = {});
  bool does_half() const;

  Storage& base_;
  CallFault fault_;
  std::function<void()> on_failure_;
  std::mutex mutex_;
  std::vector<StorageCall> calls_;
  int64_t failures_ = 0;
  std::atomic<bool> lost_everything_ = false;  // syncs of everything do nothing any more
};

}  // namespace isoshard::checkpoint
