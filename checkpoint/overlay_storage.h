// A disk on which some folders show what lies in several: shards of one checkpoint that each node
// has kept on a disk of its own.
#pragma once

#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "checkpoint/posix_storage.h"

namespace isoshard::checkpoint {

// From now on `folder` holds, for reading, the files of all `others` too, at the same places
// inside. A file that lies in two of them must have the same bytes: Error(kMismatch) names it
// otherwise.
class OverlayStorage : public PosixStorage {
 public:
  void lay_over(const std::string& folder, const std::vector<std::string>& others);

  std::unique_ptr<ReadableFile> open_read(const std::string& path) override;
  std::vector<DirectoryEntry> list(const std::string& directory) override;
  bool is_file(const std::string& path) override;
  bool is_directory(const std::string& path) override;

 private:
  // The places where a path may lie: itself, then the same inside each of the others.
  std::vector<std::string> places(const std::string& path) const;
  void check_same(const std::string& path, const std::string& first, const std::string& second);

  std::string folder_;
  std::vector<std::string> others_;
  std::mutex mutex_;  // of checked_
  std::set<std::string> checked_;
};

}  // namespace isoshard::checkpoint
