// PosixStorage: bytes on a disk that the operating system mounts. It turns every failed system call
// into an Error that says what was tried, why it failed and what to do, and it retries nothing but
// interrupted calls and the opening of a stale network handle.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/storage.h"

namespace isoshard::checkpoint {

// Thread-safe: it has no state. Beyond what Storage promises:
//   - open_read follows symbolic links to regular files (download caches are made of them) and
//     refuses FIFOs, sockets and devices at once with kHostile, without waiting on them.
//   - create and open_write never follow a symbolic link in the last component.
//   - list calls a link to a regular file a file; every other link is kOther, so that a walk
//   neither
//     leaves its tree nor goes in circles. remove_tree never follows a link.
//   - is_file and is_directory answer false only for what is absent; a refused look-up throws.
//   - a failed sync is never repeated: the kernel may have dropped the bytes, and a second call
//     would then succeed.
//   - sync_directory does nothing where the file system cannot sync directories (EINVAL).
class PosixStorage : public Storage {
 public:
  std::unique_ptr<ReadableFile> open_read(const std::string& path) override;
  std::unique_ptr<WritableFile> create(const std::string& path) override;
  std::unique_ptr<WritableFile> open_write(const std::string& path) override;
  std::vector<DirectoryEntry> list(const std::string& directory) override;
  bool is_file(const std::string& path) override;
  bool is_directory(const std::string& path) override;
  void make_directories(const std::string& path) override;
  void make_directory(const std::string& path) override;
  // Where the kernel cannot rename without replacing (NFS, FUSE): a folder's name is reserved by
  // mkdir and replaced while empty, so a crash in between leaves an empty folder; a file is linked
  // to the new name and unlinked from the old one.
  bool rename_if_absent(const std::string& from, const std::string& to) override;
  void rename_over(const std::string& from, const std::string& to) override;
  // Has no fallback: two renames would leave a moment without either; kUnsupported instead.
  void exchange(const std::string& a, const std::string& b) override;
  void remove_file(const std::string& path) override;
  // Also removes a single file or link; makes read-only folders of ours writable to empty them.
  void remove_tree(const std::string& path) override;
  void sync_directory(const std::string& path) override;
  void sync_everything(const std::string& path) override;
  // `path` need not exist: its nearest existing folder is asked.
  void drop_cache(const std::string& path) override;
  FreeSpace free_space(const std::string& path) override;
  std::string canonical(const std::string& path) override;
};

}  // namespace isoshard::checkpoint
