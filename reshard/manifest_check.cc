// See manifest_check.h.
#include "reshard/manifest_check.h"

#include <algorithm>
#include <numeric>
#include <set>

#include "checkpoint/cancel.h"
#include "checkpoint/deepspeed/source.h"
#include "checkpoint/format/crc.h"
#include "core/error.h"
#include "core/mutant.h"
#include "core/polynomial.h"
#include "reshard/parallel.h"

namespace isoshard::reshard {
namespace {

using checkpoint::ManifestFile;

constexpr int64_t kStepBytes = 1 << 20;
constexpr int64_t kSha256Bytes = int64_t{1} << 28;  // files under SHA-256 are small papers

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

LeafCrc crc_of_file(Storage& storage, const std::string& path) {
  const std::unique_ptr<ReadableFile> file = storage.open_read(path);
  checkpoint::RawCrcs crcs;
  std::vector<std::byte> bytes;
  const int64_t size = file->size_bytes();
  for (int64_t at = 0; at < size; at += kStepBytes) {
    checkpoint::throw_if_cancelled();
    bytes.resize(static_cast<size_t>(std::min(kStepBytes, size - at)));
    file->read_at(at, bytes);
    crcs.update(bytes);
  }
  return {true, crc64_ecma_polynomial().finish(crcs.ecma, size),
          crc64_jones_polynomial().finish(crcs.jones, size)};
}

// Everything in the folder that is no folder, by path relative to it, with its size.
std::map<std::string, int64_t> files_in(Storage& storage, const std::string& folder) {
  std::map<std::string, int64_t> files;
  std::vector<std::string> folders = {""};
  while (!folders.empty()) {
    const std::string inner = std::move(folders.back());
    folders.pop_back();
    const std::string path = inner.empty() ? folder : checkpoint::join(folder, inner);
    for (const DirectoryEntry& entry : storage.list(path)) {
      const std::string name = checkpoint::join(inner, entry.name);
      if (entry.kind == DirectoryEntry::Kind::kDirectory)
        folders.push_back(name);
      else
        files.emplace(name, entry.size_bytes);
    }
  }
  return files;
}

std::string hash_text(uint64_t ecma, uint64_t jones) {
  return "crc64x2:" + checkpoint::hex16(ecma) + checkpoint::hex16(jones);
}

class FileCheck {
 public:
  enum class Outcome { kEqual, kDiffers, kUnchecked };

  Outcome outcome = Outcome::kEqual;
  std::string how;  // it differs, or why it was not checked

  void run(Storage& storage, const std::string& folder, const ManifestFile& file, int64_t size,
           const FileCrcs& known) {
    if (size != file.size_bytes) {
      return differs(std::to_string(size) + " bytes instead of " + std::to_string(file.size_bytes));
    }
    const std::string path = checkpoint::join(folder, file.path);
    std::string found;
    if (file.hash.starts_with("crc64x2:")) {
      const auto crc = known.find(file.path);
      const LeafCrc crcs = crc != known.end() ? crc->second : crc_of_file(storage, path);
      found = hash_text(crcs.ecma, crcs.jones);
    } else if (file.hash.starts_with("sha256:") && size <= kSha256Bytes) {
      found = "sha256:" + checkpoint::sha256_hex(read_small_file(storage, path, kSha256Bytes));
    } else {
      outcome = Outcome::kUnchecked;
      how = file.hash;
      return;
    }
    if (found != file.hash && !mutant("manifest_sizes_only"))
      differs(found + " instead of " + file.hash);
  }

 private:
  void differs(std::string text) {
    outcome = Outcome::kDiffers;
    how = std::move(text);
  }
};

}  // namespace

std::vector<int> every_file(const checkpoint::ShardedState& state) {
  std::vector<int> files;
  for (size_t i = 0; i < state.files.size(); ++i) {
    if (state.files[i].inside) files.push_back(static_cast<int>(i));
  }
  return files;
}

FileCrcs file_crcs(const checkpoint::ShardedState& state, const StreamOptions& options,
                   const StreamResult& result) {
  FileCrcs crcs;
  for (size_t i = 0; i < options.whole_files.size(); ++i) {
    const auto file = static_cast<size_t>(options.whole_files[i]);
    crcs[state.files[file].relative] = result.whole_files[i];
  }
  return crcs;
}

ManifestFile manifest_file(const FileHash& file) {
  return {file.path, file.size_bytes, hash_text(file.ecma, file.jones)};
}

std::string why_file_differs(Storage& storage, const std::string& folder,
                             const ManifestFile& file) {
  const int64_t size = storage.open_read(checkpoint::join(folder, file.path))->size_bytes();
  FileCheck check;
  check.run(storage, folder, file, size, {});
  return check.how;
}

ManifestReport check_manifest(Storage& storage, const std::string& folder,
                              const checkpoint::Manifest& manifest, const FileCrcs& known,
                              int workers) {
  const std::map<std::string, int64_t> there = files_in(storage, folder);
  std::vector<FileCheck> checks(manifest.files.size());
  parallel_for(checks.size(), workers, [&](size_t i) {
    const auto file = there.find(manifest.files[i].path);
    if (file != there.end()) {
      checks[i].run(storage, folder, manifest.files[i], file->second, known);
    }
  });
  ManifestReport report;
  std::set<std::string> listed = {checkpoint::kManifestName};
  bool any_torch = false, all_differ = true;
  for (size_t i = 0; i < checks.size(); ++i) {
    const std::string& path = manifest.files[i].path;
    listed.insert(path);
    const bool absent = there.count(path) == 0;
    const bool differs = checks[i].outcome == FileCheck::Outcome::kDiffers;
    if (absent && !mutant("manifest_missing_ignored")) report.missing.push_back(quote(path));
    const std::string text = quote(path) + ": " + checks[i].how;
    if (differs) report.differing.push_back(text);
    if (checks[i].outcome == FileCheck::Outcome::kUnchecked) report.unchecked.push_back(text);
    if (!ends_with(path, ".pt")) continue;
    any_torch = true;
    all_differ = all_differ && differs;
  }
  for (const auto& [path, size] : there) {
    const bool leftover = checkpoint::base_name(path).starts_with(".nfs");
    if (!leftover && listed.count(path) == 0 && !mutant("manifest_unlisted_ignored"))
      report.unlisted.push_back(quote(path));
  }
  report.earlier_save =
      any_torch &&
      (all_differ || (mutant("manifest_set_aside_early") && !report.differing.empty()));
  return report;
}

}  // namespace isoshard::reshard
