// A storage seen through something that changes what is read there, and writes nothing: whoever
// writes through it has a bug, which a CheckFailure tells. Views override what they change.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/error.h"
#include "core/storage.h"

namespace isoshard::checkpoint {

// `base` outlives the view, and the files it has opened.
class ReadingView : public Storage {
 public:
  explicit ReadingView(Storage& base) : base_(base) {}

  std::unique_ptr<ReadableFile> open_read(const std::string& path) override {
    return base_.open_read(path);
  }
  std::vector<DirectoryEntry> list(const std::string& path) override { return base_.list(path); }
  bool is_file(const std::string& path) override { return base_.is_file(path); }
  bool is_directory(const std::string& path) override { return base_.is_directory(path); }
  FreeSpace free_space(const std::string& path) override { return base_.free_space(path); }
  std::string canonical(const std::string& path) override { return base_.canonical(path); }

  std::unique_ptr<WritableFile> create(const std::string& path) final { refuse(path); }
  std::unique_ptr<WritableFile> open_write(const std::string& path) final { refuse(path); }
  void make_directories(const std::string& path) final { refuse(path); }
  void make_directory(const std::string& path) final { refuse(path); }
  bool rename_if_absent(const std::string& from, const std::string&) final { refuse(from); }
  void rename_over(const std::string& from, const std::string&) final { refuse(from); }
  void exchange(const std::string& a, const std::string&) final { refuse(a); }
  void remove_file(const std::string& path) final { refuse(path); }
  void remove_tree(const std::string& path) final { refuse(path); }
  void sync_directory(const std::string& path) final { refuse(path); }
  void sync_everything(const std::string& path) final { refuse(path); }
  void drop_cache(const std::string& path) final { refuse(path); }

 protected:
  Storage& base_;

 private:
  [[noreturn]] static void refuse(const std::string& path) {
    throw CheckFailure("a view for reading is written to: " + quote(path));
  }
};

}  // namespace isoshard::checkpoint
