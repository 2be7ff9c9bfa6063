// VolatileStorage: a disk in memory that also knows what a power failure would leave of it, at any
// moment of its history. A job runs on it once; the state behind every operation is then found by
// applying the log to base() again, without running the job.
#pragma once

#include <mutex>
#include <vector>

#include "checkpoint/volatile_storage_disk.h"

namespace isoshard::checkpoint {

// Thread-safe as MemoryStorage is. Outlives the files that it has opened for writing.
class VolatileStorage final : public MemoryStorage {
 public:
  std::unique_ptr<WritableFile> create(const std::string& path) override;
  std::unique_ptr<WritableFile> open_write(const std::string& path) override;
  void make_directories(const std::string& path) override;
  void make_directory(const std::string& path) override;
  bool rename_if_absent(const std::string& from, const std::string& to) override;
  void rename_over(const std::string& from, const std::string& to) override;
  void exchange(const std::string& a, const std::string& b) override;
  void remove_file(const std::string& path) override;
  void remove_tree(const std::string& path) override;  // many operations, as on a real disk
  void sync_directory(const std::string& path) override;
  void sync_everything(const std::string& path) override;

  // False: folders cannot be renamed or exchanged, as in mounts of object stores.
  bool renames_folders = true;

  // What lies on the disk if power fails now.
  std::unique_ptr<MemoryStorage> after_crash(Durability model, uint64_t seed) const;

  // From here on: everything so far is durable, and the log is empty.
  void begin_log();
  const VolatileDisk& base() const { return base_; }  // as it was at begin_log()
  const std::vector<DiskOperation>& log() const { return log_; }

 private:
  friend class LoggedFile;
  struct Slot {
    int folder = -1;
    std::string name;
  };
  Slot slot_of(const std::string& path);
  int node_at(const std::string& path) { return disk_.node_at(canonical(path)); }
  void require_renames(const std::string& path);
  void note(DiskOperation operation);
  void note_new(const std::string& path, DiskOperation::Makes makes);
  void note_removed(int folder, const std::string& name, const std::string& path);
  void note_rename(const std::string& from, const std::string& to);

  mutable std::mutex mutex_;
  VolatileDisk disk_, base_;
  std::vector<DiskOperation> log_;
};

}  // namespace isoshard::checkpoint
