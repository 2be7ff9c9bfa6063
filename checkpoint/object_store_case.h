// A storage for tests that behaves as mounts of object stores do: files can be renamed, folders
// cannot. It can also lose all power just before the manifest is written.
#pragma once

#include <string>

#include "checkpoint/memory_storage.h"
#include "core/error.h"

namespace isoshard::checkpoint {

class ObjectStore final : public MemoryStorage {
 public:
  bool rename_if_absent(const std::string& from, const std::string& to) override {
    if (is_directory(from)) throw Error(ErrorInfo{.what = "Renaming failed.", .file = from});
    return MemoryStorage::rename_if_absent(from, to);
  }
  std::unique_ptr<WritableFile> create(const std::string& path) override {
    ends_ = ends_ || (ends_at_manifest && path.ends_with("/MANIFEST.json"));
    if (ends_) throw Error(ErrorInfo{.what = "The power is gone.", .file = path});
    return MemoryStorage::create(path);
  }
  void remove_tree(const std::string& path) override {
    if (!ends_) MemoryStorage::remove_tree(path);
  }

  bool ends_at_manifest = false;

 private:
  bool ends_ = false;
};

}  // namespace isoshard::checkpoint
