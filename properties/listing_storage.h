// A Storage whose folders are listed in a shuffled order, as a file system may list them.
#pragma once

#include <string>
#include <utility>

#include "core/random.h"
#include "core/storage.h"

namespace isoshard::properties {

class ListingStorage final : public Storage {
 public:
  ListingStorage(Storage& base, uint64_t seed) : base_(base), random_(seed) {}

  std::vector<DirectoryEntry> list(const std::string& directory) override {
    std::vector<DirectoryEntry> entries = base_.list(directory);
    for (size_t i = entries.size(); i > 1; --i) {
      std::swap(entries[i - 1],
                entries[static_cast<size_t>(random_.below(static_cast<int64_t>(i)))]);
    }
    return entries;
  }

  std::unique_ptr<ReadableFile> open_read(const std::string& path) override {
    return base_.open_read(path);
  }
  std::unique_ptr<WritableFile> create(const std::string& path) override {
    return base_.create(path);
  }
  std::unique_ptr<WritableFile> open_write(const std::string& path) override {
    return base_.open_write(path);
  }
  bool is_file(const std::string& path) override { return base_.is_file(path); }
  bool is_directory(const std::string& path) override { return base_.is_directory(path); }
  void make_directories(const std::string& path) override { base_.make_directories(path); }
  void make_directory(const std::string& path) override { base_.make_directory(path); }
  bool rename_if_absent(const std::string& from, const std::string& to) override {
    return base_.rename_if_absent(from, to);
  }
  void rename_over(const std::string& from, const std::string& to) override {
    base_.rename_over(from, to);
  }
  void exchange(const std::string& a, const std::string& b) override { base_.exchange(a, b); }
  void remove_file(const std::string& path) override { base_.remove_file(path); }
  void remove_tree(const std::string& path) override { base_.remove_tree(path); }
  void sync_directory(const std::string& path) override { base_.sync_directory(path); }
  void sync_everything(const std::string& path) override { base_.sync_everything(path); }
  void drop_cache(const std::string& path) override { base_.drop_cache(path); }
  FreeSpace free_space(const std::string& path) override { return base_.free_space(path); }
  std::string canonical(const std::string& path) override { return base_.canonical(path); }

 private:
  Storage& base_;
  Random random_;
};

}  // namespace isoshard::properties
