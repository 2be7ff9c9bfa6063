// A storage for tests that behaves as mounts of object stores do: files can be renamed, folders
// cannot, or only empty ones (gcsfuse). It can also lose all power before a file of some name.
#pragma once

#include <memory>
#include <string>

#include "checkpoint/memory_storage.h"
#include "core/error.h"

namespace isoshard::checkpoint {

class ObjectStore final : public MemoryStorage {
 public:
  bool rename_if_absent(const std::string& from, const std::string& to) override {
    const bool refused = is_directory(from) && (!renames_empty || !list(from).empty());
    if (refused && refusals-- > 0) throw Error(ErrorInfo{.what = "Renaming failed.", .file = from});
    return MemoryStorage::rename_if_absent(from, to);
  }
  std::unique_ptr<WritableFile> create(const std::string& path) override {
    ends_ = ends_ || (!ends_at.empty() && path.ends_with("/" + ends_at));
    if (ends_) throw Error(ErrorInfo{.what = "The power is gone.", .file = path});
    return MemoryStorage::create(path);
  }
  void remove_tree(const std::string& path) override {
    if (!ends_) MemoryStorage::remove_tree(path);
  }

  std::string ends_at;         // name of the file that is not written any more, nor any later
  bool renames_empty = false;  // folders
  int refusals = 1 << 30;      // so many folders are not renamed

 private:
  bool ends_ = false;
};

}  // namespace isoshard::checkpoint
