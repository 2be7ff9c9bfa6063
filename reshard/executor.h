// The executor: reads every source byte once, in order, and writes it wherever the plan says, with
// CRCs and digests taken from the very bytes that move. Flat memory, no temporary files.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "core/communicator.h"
#include "reshard/plan.h"

namespace isoshard::reshard {

// CRC-64 pair of a leaf's row-major bytes (docs/formats/digest.md).
struct LeafCrc {
  bool known = false;
  uint64_t ecma = 0;
  uint64_t jones = 0;
  bool operator==(const LeafCrc&) const = default;
};

struct FileHash {
  std::string path;
  int64_t size_bytes = 0;
  uint64_t ecma = 0;
  uint64_t jones = 0;
};

struct LeafCast {
  int leaf = -1;
  DType dtype = DType::kFloat32;
};

struct StreamOptions {
  int workers = 2;
  int open_files = 256;     // most target files open at a time
  bool sync_files = false;  // sync each file as it is finished
  // Files of the plan may lie there, whatever they hold: only what differs is written. Others may
  // not.
  bool resume = false;
  std::vector<int> digest;  // leaves whose CRC is taken on the way
  // Leaves in `digest`, each once at most, whose CRC after a cast is taken too.
  std::vector<LeafCast> casts;
  std::vector<int> whole_files;  // source files that are read whole, for their CRC
  // Ranks that share the work, on a file system that all see: each reads a part of the source's
  // bytes and writes them where they belong, and all get the same result. Each gives the same
  // options but `workers` and `progress`, which is of its own part. Not with `resume`. Whether all
  // see the same files is the caller's to know: nothing here compares what ranks have opened.
  Communicator* team = nullptr;
  std::function<void(int64_t done, int64_t total)> progress;  // called a few times a second
};

// With StreamOptions::resume: what lay there already.
struct ResumeResult {
  int64_t files_found = 0;
  int64_t files_equal = 0;  // of those: nothing had to be written
  int64_t bytes_equal = 0;  // holes that must be there included
  int64_t bytes_wrong = 0;  // others stood there, where not just nothing did
};

struct StreamResult {
  std::vector<LeafCrc> leaves;  // by leaf number; of the source's bytes
  // By number in options.casts; not known where a leaf's elements do not lie in one piece.
  std::vector<LeafCrc> casts;
  std::vector<LeafCrc> whole_files;  // by number in options.whole_files
  std::vector<FileHash> files;       // by target file; of the bytes handed to write
  int64_t bytes_read = 0;
  int64_t bytes_written = 0;
  ResumeResult resumed;
};

// Writes the plan's files under `folder` (which exists). Every record of the source that is touched
// is read whole and its CRC is checked: Error(kCorrupt) names file and record.
StreamResult execute(Storage& storage, const checkpoint::ShardedState& state,
                     const ReshardPlan& plan, const std::string& folder,
                     const StreamOptions& options);

// The same without targets: reads the leaves in options.digest and checks their records.
StreamResult digest_leaves(Storage& storage, const checkpoint::ShardedState& state,
                           const StreamOptions& options);

}  // namespace isoshard::reshard
