// A lock on a folder that is being written: who holds it lives, as the system lets go of it when a
// process ends, however it ends. It stays with the folder when that is renamed.
//
// It is the kernel's flock on the folder itself: no file is left behind, and none must be removed
// before the folder is shown. Other machines that mount the same file system do not see it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "core/storage.h"

namespace isoshard::checkpoint {

// Holds the lock while it lives.
class FolderLock {
 public:
  virtual ~FolderLock() = default;
};

struct LockAnswer {
  enum class State {
    kOurs,     // `lock` holds it
    kTheirs,   // another holds it, or the folder has got another name meanwhile
    kUnknown,  // this file system, or this storage, has no such locks
  };
  State state = State::kUnknown;
  std::unique_ptr<FolderLock> lock;
  // Whether machines that do not see the lock may write there (is_shared_file_system).
  bool shared = true;
};

// What lies under a name, links not followed.
struct OwnEntry {
  enum class Kind {
    kFile,    // a regular file of this user, with one name alone, which may be read and written
    kFolder,  // a folder of this user
    kOther,   // neither, or somebody else's
  };
  Kind kind = Kind::kOther;
  int64_t size_bytes = 0;
  int64_t stored_bytes = 0;  // without holes
  int64_t changed_at = 0;    // seconds since 1970; the later of content and state
};

// Does not wait. Throws Error where the folder is not there, or is a link, or where the lock fails
// for another reason than that there are none. Only a real disk (PosixStorage) has locks.
LockAnswer lock_folder(Storage& storage, const std::string& path);

// The same, asked for again up to so many times, 20 ms apart, while another holds it: it may be
// held for a moment alone, by who wants to learn whether somebody does.
LockAnswer lock_folder_patiently(Storage& storage, const std::string& path, int tries);

// kOther also where nothing is. Of a real disk alone.
OwnEntry look_at(const std::string& path);

// Whether other machines may write where `path` lies: NFS, Lustre, FUSE and what is not known.
bool is_shared_file_system(const std::string& path);

// lock_folder_patiently for a folder that was just made. Throws Error(kExists) in the end.
std::unique_ptr<FolderLock> lock_new_folder(Storage& storage, const std::string& path);

}  // namespace isoshard::checkpoint
