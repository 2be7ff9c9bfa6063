// See overlay_storage.h.
#include "checkpoint/overlay_storage.h"

#include <map>

#include "checkpoint/small_file.h"
#include "core/error.h"
#include "core/mutant.h"

namespace isoshard::checkpoint {
namespace {

std::string without_slash(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  return path;
}

}  // namespace

void OverlayStorage::lay_over(const std::string& folder, const std::vector<std::string>& others) {
  folder_ = without_slash(folder);
  for (const std::string& other : others) {
    if (!PosixStorage::is_directory(other)) {
      throw Error(ErrorInfo{.code = ErrorCode::kNotFound,
                            .what = "There is no such folder.",
                            .file = other,
                            .expected = "a folder with further files of the same checkpoint",
                            .next = "check the path that --also gives"});
    }
    others_.push_back(without_slash(other));
  }
}

std::vector<std::string> OverlayStorage::places(const std::string& path) const {
  std::vector<std::string> result = {path};
  const bool inside = path == folder_ || path.starts_with(folder_ + "/");
  if (!inside || others_.empty()) return result;
  for (const std::string& other : others_) result.push_back(other + path.substr(folder_.size()));
  return result;
}

void OverlayStorage::check_same(const std::string& path, const std::string& first,
                                const std::string& second) {
  {
    const std::lock_guard lock(mutex_);
    if (!checked_.insert(second).second) return;
  }
  if (same_bytes(*this, first, second) || mutant("overlay_disagrees")) return;
  throw Error(ErrorInfo{.code = ErrorCode::kMismatch,
                        .what = "Two folders hold different files for one place.",
                        .file = path,
                        .expected = "the same bytes in " + quote(first),
                        .found = "others in " + quote(second),
                        .next = "the folders may be of two saves; compare their times and steps"});
}

std::unique_ptr<ReadableFile> OverlayStorage::open_read(const std::string& path) {
  for (const std::string& place : places(path)) {
    if (PosixStorage::is_file(place)) return PosixStorage::open_read(place);
  }
  return PosixStorage::open_read(path);
}

std::vector<DirectoryEntry> OverlayStorage::list(const std::string& directory) {
  const std::vector<std::string> all = places(directory);
  if (all.size() == 1) return PosixStorage::list(directory);
  std::map<std::string, std::pair<DirectoryEntry, std::string>> merged;  // and its place
  for (const std::string& place : all) {
    if (!PosixStorage::is_directory(place)) continue;
    for (DirectoryEntry& entry : PosixStorage::list(place)) {
      const std::string path = place + "/" + entry.name;
      const auto [known, fresh] = merged.try_emplace(entry.name, entry, path);
      if (!fresh && entry.kind == DirectoryEntry::Kind::kFile)
        check_same(directory + "/" + entry.name, known->second.second, path);
    }
  }
  std::vector<DirectoryEntry> result;
  for (auto& [name, found] : merged) result.push_back(std::move(found.first));
  return result;
}

bool OverlayStorage::is_file(const std::string& path) {
  for (const std::string& place : places(path)) {
    if (PosixStorage::is_file(place)) return true;
  }
  return false;
}

bool OverlayStorage::is_directory(const std::string& path) {
  for (const std::string& place : places(path)) {
    if (PosixStorage::is_directory(place)) return true;
  }
  return false;
}

}  // namespace isoshard::checkpoint
