// MemoryStorage: a disk that is a map, for tests that need many checkpoints and no files. It has
// the error codes of the real one, keeps everything at once, and knows no links or permissions.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/storage.h"

namespace isoshard::checkpoint {

struct MemoryTree;

// Thread-safe. Relative paths begin at "/"; "." and ".." are resolved by their letters. Files stay
// readable and writable after their names are gone, and after the storage itself.
class MemoryStorage : public Storage {
 public:
  MemoryStorage();
  ~MemoryStorage() override;

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
  void drop_cache(const std::string&) override {}
  FreeSpace free_space(const std::string& path) override;
  // What free_space() says from now on; nothing is refused for it.
  void tell_free_space(int64_t bytes) { free_bytes_ = bytes; }
  std::string canonical(const std::string& path) override;

 private:
  std::unique_ptr<MemoryTree> tree_;
  int64_t free_bytes_ = int64_t{1} << 50;
};

}  // namespace isoshard::checkpoint
