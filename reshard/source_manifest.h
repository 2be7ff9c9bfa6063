// Whether a source that isoshard has published is still as its MANIFEST.json says; judged from the
// CRCs of a pass that is made anyway.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "checkpoint/manifest.h"
#include "reshard/executor.h"

namespace isoshard::reshard {

class SourceManifest {
 public:
  // Nothing is judged where there is no manifest. Throws what parsing it throws.
  SourceManifest(Storage& storage, const checkpoint::ShardedState& state);

  // Adds the CRCs of whole files: of all of them, or of those alone that hold a leaf in
  // options->digest already; the sizes of the others are still looked at.
  void ask(bool all_files, StreamOptions* options);

  // After that pass: a paragraph for each kind of difference. Empty where all is as it was, and
  // where another program has saved into the folder since.
  std::vector<std::string> judge(const StreamOptions& options, const StreamResult& result) const;

 private:
  Storage& storage_;
  const checkpoint::ShardedState& state_;
  std::optional<checkpoint::Manifest> manifest_;
};

}  // namespace isoshard::reshard
