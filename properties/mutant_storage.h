// A way to a disk that does one thing wrong, as a program with one mistake would. The laws of power
// loss must notice each (tests/power_loss_test.cc).
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/storage.h"

namespace isoshard::properties {

struct StorageMutant {
  enum class Kind {
    kNone,
    kLostFileSync,      // syncs of files do nothing
    kLostFolderSync,    // syncs of folders do nothing
    kLateFileSync,      // a file is synced behind the next rename, not before it
    kEarlyPointer,      // the pointer names the new folder before that has its name
    kTwoStepExchange,   // the old folder is removed, then the new one renamed
    kTwoStepReplace,    // the old file is removed, then the new one renamed
    kRewrittenFile,     // a file that is replaced is written over
    kLostMark,          // a publication in place leaves no mark while it is at work
    kWriteBehindSync,   // a file's last write comes after its sync
    kEarlyPublication,  // the folder gets its final name when its first file is written
    kRetriedSync,       // a file's sync that has failed is tried again
    kSwallowedWrite,    // the errors of writes are swallowed
    kSwallowedClose,    // those of closing a file are
    kKeptStaging,       // what was begun is not removed
    kMuteError,         // errors lose their path and what to do next
  };
  Kind kind = Kind::kNone;
  int nth = -1;                     // of such syncs; -1: all
  bool without_whole_sync = false;  // sync_everything does nothing either
};

class MutantStorage final : public Storage {
 public:
  // `pointer`: the path of `latest`; empty: there is none. `base` outlives the object.
  MutantStorage(Storage& base, const StorageMutant& mutant, std::string pointer)
      : base_(base), mutant_(mutant), pointer_(std::move(pointer)) {}

  int file_syncs() const { return file_syncs_; }  // that were asked for
  int folder_syncs() const { return folder_syncs_; }
  int64_t strikes() const { return strikes_; }  // what was done wrong, syncs of everything aside

  std::unique_ptr<ReadableFile> open_read(const std::string& path) override {
    return base_.open_read(at(path));
  }
  std::unique_ptr<WritableFile> create(const std::string& path) override;
  std::unique_ptr<WritableFile> open_write(const std::string& path) override {
    return base_.open_write(at(path));
  }
  std::vector<DirectoryEntry> list(const std::string& directory) override {
    return base_.list(at(directory));
  }
  bool is_file(const std::string& path) override;
  bool is_directory(const std::string& path) override { return base_.is_directory(at(path)); }
  void make_directories(const std::string& path) override { base_.make_directories(at(path)); }
  void make_directory(const std::string& path) override { base_.make_directory(at(path)); }
  bool rename_if_absent(const std::string& from, const std::string& to) override;
  void rename_over(const std::string& from, const std::string& to) override;
  void exchange(const std::string& a, const std::string& b) override;
  void remove_file(const std::string& path) override;
  void remove_tree(const std::string& path) override;
  void sync_directory(const std::string& path) override;
  void sync_everything(const std::string& path) override {
    if (!mutant_.without_whole_sync) base_.sync_everything(at(path));
  }
  void drop_cache(const std::string& path) override { base_.drop_cache(at(path)); }
  FreeSpace free_space(const std::string& path) override { return base_.free_space(at(path)); }
  std::string canonical(const std::string& path) override { return base_.canonical(at(path)); }

 private:
  friend class MutantFile;
  using Kind = StorageMutant::Kind;
  bool is(Kind kind) const { return mutant_.kind == kind; }
  // Whether the mistake is made here.
  bool strikes_as(Kind kind, bool applies = true);
  bool strikes_sync(Kind kind, int number) {
    return strikes_as(kind, mutant_.nth < 0 || mutant_.nth == number);
  }
  // Where a path lies now.
  std::string at(const std::string& path) const;
  void move_pointer(const std::string& folder);
  void publish_early(const std::string& path);
  void run_late();

  Storage& base_;
  StorageMutant mutant_;
  std::string pointer_;
  int file_syncs_ = 0, folder_syncs_ = 0;
  int64_t strikes_ = 0;
  std::vector<std::shared_ptr<WritableFile>> late_;  // not synced yet, nor closed
  std::string begun_;                                // the hidden folder with a first file
  std::string moved_from_, moved_to_;                // what was published early
};

}  // namespace isoshard::properties
