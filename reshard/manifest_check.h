// A published folder against its MANIFEST.json: is every listed file there as it was written, and
// nothing else?
#pragma once

#include <map>
#include <string>
#include <vector>

#include "checkpoint/manifest.h"
#include "core/storage.h"
#include "reshard/executor.h"

namespace isoshard::reshard {

struct ManifestReport {
  std::vector<std::string> missing;    // listed, not there
  std::vector<std::string> unlisted;   // there, not listed; ".nfs…" leftovers of NFS do not count
  std::vector<std::string> differing;  // other size or hash: "path: 10 bytes instead of 12"
  std::vector<std::string> unchecked;  // hash of an unknown kind
  // Another program has saved into the folder: every *.pt file that the manifest lists is there
  // and none is the one that was written.
  bool earlier_save = false;

  bool holds() const {
    return missing.empty() && unlisted.empty() && differing.empty() && unchecked.empty();
  }
};

// The manifest's entry of a file that was written.
checkpoint::ManifestFile manifest_file(const FileHash& file);

// Whole-file CRCs by path relative to the folder; files not in it are read here.
using FileCrcs = std::map<std::string, LeafCrc>;

// All of a state's files, for StreamOptions::whole_files; and by path, what a pass made of them.
std::vector<int> every_file(const checkpoint::ShardedState& state);
FileCrcs file_crcs(const checkpoint::ShardedState& state, const StreamOptions& options,
                   const StreamResult& result);

// Paths in the report are relative to the folder, and quoted. Throws what reading throws.
ManifestReport check_manifest(Storage& storage, const std::string& folder,
                              const checkpoint::Manifest& manifest, const FileCrcs& known,
                              int workers);

// One file, opened by its name and not looked for in a list: how it differs from what the entry
// says, or that its hash is of an unknown kind; "" where it is equal. Throws what reading throws,
// also where it is not there.
std::string why_file_differs(Storage& storage, const std::string& folder,
                             const checkpoint::ManifestFile& file);

}  // namespace isoshard::reshard
