// A conversion from plan to published folder: write, verify, manifest, certificate, rename.
#pragma once

#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "reshard/digest.h"
#include "reshard/executor.h"

namespace isoshard::checkpoint {
struct LeftoverFolder;
}

namespace isoshard::reshard {

enum class VerifyMode { kStream, kReread, kDisk };

struct ConvertOptions {
  std::string target;  // the folder that appears
  bool overwrite = false;
  // What is written is kept when a signal ends the run, to be gone on from. What such a run has
  // left is gone on from: `leftover`, if there is one (convert() takes it).
  bool resume = false;
  std::shared_ptr<checkpoint::LeftoverFolder> leftover;
  bool weights_only = false;  // the target holds weights and buffers: nothing else is read
  // What to do with a source that does not agree with itself, which verify calls SUSPECT.
  enum class Doubt { kRefuse, kGoOn, kDoNotLook } doubt = Doubt::kRefuse;
  std::vector<std::string> forced;  // doubts that the caller has gone on from already
  VerifyMode verify = VerifyMode::kReread;
  StreamOptions stream;
  std::string latest_path;  // pointer file to replace last; empty: none
  std::string latest_text;
  // Copied beside the published folder, before the pointer is replaced: from, to.
  std::vector<std::pair<std::string, std::string>> side_files;
  std::set<std::string> dropped;  // parts of hyper that the caller allowed to be left behind
  nlohmann::json certificate;     // what the caller knows: source, target, inferred, …
  std::function<void(const std::string& phase)> phase;
};

struct ConvertResult {
  Digest source;  // of what was read
  Digest target;  // of what was written, read back (reread, disk)
  StreamResult stream;
  bool resumed = false;             // stream.resumed says what was there
  std::vector<std::string> forced;  // options.forced, and what else was found and gone on from
  nlohmann::json certificate;
};

// Publishes the plan's files as options.target, or nothing. With options.stream.team all its ranks
// call it, and get the same result; the first one alone stages and publishes. Throws
// Error(kMismatch) when what was written is not what was read (nothing is published then).
// `sections` are compared by cast rules: a section is "equal", "cast" or "absent".
ConvertResult convert(Storage& storage, const checkpoint::ShardedState& state,
                      const ReshardPlan& plan, const ConvertOptions& options);

// equal | cast | absent for each section of the source; throws Error(kMismatch) on a difference.
nlohmann::json compare_sections(const checkpoint::ShardedState& source, const Digest& source_digest,
                                const checkpoint::ShardedState& target, const Digest& target_digest,
                                const std::set<std::string>& dropped = {});

}  // namespace isoshard::reshard
