// See source_manifest.h.
#include "reshard/source_manifest.h"

#include <set>

#include "checkpoint/deepspeed/source.h"
#include "reshard/manifest_check.h"
#include "reshard/report_text.h"

namespace isoshard::reshard {

using checkpoint::ShardedState;

SourceManifest::SourceManifest(Storage& storage, const ShardedState& state)
    : storage_(storage), state_(state) {
  const std::string path = checkpoint::join(state.folder, checkpoint::kManifestName);
  if (!storage.is_file(path)) return;
  manifest_ = checkpoint::parse_manifest(
      read_small_file(storage, path, checkpoint::kLargestManifestBytes), path);
}

void SourceManifest::ask(bool all_files, StreamOptions* options) {
  if (!manifest_) return;
  if (all_files) {
    options->whole_files = every_file(state_);
    return;
  }
  std::set<int> files;
  for (int leaf : options->digest) {
    for (const checkpoint::FileFragment& f : state_.leaf(leaf).fragments) files.insert(f.file);
  }
  std::erase_if(files, [&](int file) { return !state_.files[static_cast<size_t>(file)].inside; });
  options->whole_files.assign(files.begin(), files.end());
}

std::vector<std::string> SourceManifest::judge(const StreamOptions& options,
                                               const StreamResult& result) const {
  std::vector<std::string> findings;
  if (!manifest_) return findings;
  const FileCrcs known = file_crcs(state_, options, result);
  checkpoint::Manifest manifest = *manifest_;
  for (checkpoint::ManifestFile& file : manifest.files) {
    const bool opened = file.hash.starts_with("crc64x2:") && !known.contains(file.path);
    if (opened) file.hash = "not read here";
  }
  const ManifestReport report =
      check_manifest(storage_, state_.folder, manifest, known, options.workers);
  if (report.earlier_save) return findings;
  const auto tell = [&](const std::vector<std::string>& files, const std::string& what) {
    if (files.empty()) return;
    findings.push_back(with_details(count_of(files.size(), "file") + " " + what, files));
  };
  tell(report.differing, "changed since the folder was published.");
  tell(report.missing, "of the manifest missing.");
  tell(report.unlisted, "in the folder not listed in the manifest.");
  return findings;
}

}  // namespace isoshard::reshard
