// See published_files.h.
#include "engine/published_files.h"

#include <algorithm>
#include <map>

#include "checkpoint/hidden_name.h"
#include "core/error.h"
#include "reshard/manifest_check.h"

namespace isoshard::engine {
namespace {

constexpr const char* kSafe = "nothing was published; the checkpoint before it is as it was";

struct Complaint {
  ErrorCode code = ErrorCode::kIncomplete;
  std::string what;
  std::string path;   // relative to the folder
  std::string ranks;  // "rank 3", or nobody
  std::string expected, found;
};

[[noreturn]] void refuse(const std::string& folder, const Complaint& complaint) {
  throw Error(ErrorInfo{.code = complaint.code,
                        .what = complaint.what,
                        .file = folder + "/" + complaint.path,
                        .entry = complaint.ranks,
                        .expected = complaint.expected,
                        .found = complaint.found,
                        .safe = kSafe,
                        .next = "see whether that rank's writer lives, writes to this very folder "
                                "and reports its errors; then save again"});
}

std::string rank_text(size_t rank) { return "rank " + std::to_string(rank); }

std::string bytes_text(int64_t size_bytes) { return std::to_string(size_bytes) + " bytes"; }

void check_size(Storage& storage, const std::string& folder, size_t rank,
                const checkpoint::ManifestFile& file) {
  int64_t size_bytes = 0;
  try {
    size_bytes = storage.open_read(folder + "/" + file.path)->size_bytes();
  } catch (const Error& error) {
    if (error.info().code != ErrorCode::kNotFound) throw;
    refuse(folder, {.what = "A rank says that it has written a file which is not there.",
                    .path = file.path,
                    .ranks = rank_text(rank),
                    .expected = bytes_text(file.size_bytes),
                    .found = "no such file"});
  }
  if (size_bytes == file.size_bytes) return;
  refuse(folder, {.what = "A rank's file has another size than the rank has written.",
                  .path = file.path,
                  .ranks = rank_text(rank),
                  .expected = bytes_text(file.size_bytes),
                  .found = bytes_text(size_bytes)});
}

bool is_mark(const std::string& name) {
  return checkpoint::is_mark_and_nonce(name, checkpoint::kStagingMark) || name.starts_with(".nfs");
}

}  // namespace

void check_names_and_sizes(Storage& storage, const std::string& folder,
                           const RankInventories& inventories) {
  std::map<std::string, size_t> writers;
  for (size_t rank = 0; rank < inventories.size(); ++rank) {
    for (const checkpoint::ManifestFile& file : inventories[rank]) {
      const auto [writer, is_new] = writers.emplace(file.path, rank);
      if (!is_new) {
        refuse(folder, {.what = "Two ranks say that they have written one file.",
                        .path = file.path,
                        .ranks = rank_text(writer->second) + " and " + rank_text(rank),
                        .expected = "files of different names",
                        .found = "one name"});
      }
      check_size(storage, folder, rank, file);
    }
  }
  for (const DirectoryEntry& entry : storage.list(folder)) {
    if (is_mark(entry.name) || writers.contains(entry.name)) continue;
    refuse(folder, {.what = "Something lies among the files of the save that no rank has written.",
                    .path = entry.name,
                    .ranks = "no rank",
                    .expected = std::to_string(writers.size()) + " files of " +
                                std::to_string(inventories.size()) + " ranks",
                    .found = quote(entry.name)});
  }
}

void check_contents(Storage& storage, const std::string& folder, size_t rank,
                    const std::vector<checkpoint::ManifestFile>& files) {
  for (const checkpoint::ManifestFile& file : files) {
    check_size(storage, folder, rank, file);
    const std::string how = reshard::why_file_differs(storage, folder, file);
    if (how.empty()) continue;
    refuse(folder, {.code = ErrorCode::kCorrupt,
                    .what = "A rank's file holds other bytes than the rank has written.",
                    .path = file.path,
                    .ranks = rank_text(rank),
                    .expected = file.hash,
                    .found = how});
  }
}

}  // namespace isoshard::engine
