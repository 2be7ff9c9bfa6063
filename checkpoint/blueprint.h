// Blueprints: what the files of a target will hold, before a payload byte has moved. Writers make
// them, the planner says where each byte comes from, one executor writes all of them.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/dtype.h"

namespace isoshard::checkpoint {

// Elements [begin, begin + count) of a leaf of the source (ShardedState::leaves) stand at element
// `at` of a storage; they are cast to the storage's dtype on the way.
struct LeafRun {
  int leaf = -1;
  int64_t begin = 0;
  int64_t count = 0;
  int64_t at = 0;
};

// Bytes of a source file, as they are.
struct SourceBytes {
  int file = -1;  // number in ShardedState::files
  int64_t offset_bytes = 0;
  int64_t size_bytes = 0;
};

// The contents of one storage: runs of leaves, or a copy, or literal bytes; the rest is zero.
struct StorageFill {
  DType dtype = DType::kFloat32;
  int64_t numel = 0;
  std::vector<LeafRun> runs;
  std::optional<SourceBytes> copy;
  std::string literal;

  int64_t size_bytes() const { return numel * item_size_bytes(dtype); }
};

struct FileBlueprint {
  enum class Kind {
    kTorch,        // zip with `head` as data.pkl and one record a storage
    kSafetensors,  // `head` (length and JSON header), then the storages one behind another
    kText,         // `head` alone
    kCopy,         // one storage that copies a source file whole
  };
  std::string path;  // relative to the target folder
  Kind kind = Kind::kTorch;
  std::string head;
  std::vector<StorageFill> storages;
};

// A storage that holds a whole leaf of `count` elements.
inline StorageFill whole_fill(int leaf, int64_t count, DType dtype) {
  StorageFill fill{.dtype = dtype, .numel = count, .runs = {}, .copy = {}, .literal = {}};
  if (count > 0) fill.runs.push_back({leaf, 0, count, 0});
  return fill;
}

// A file that is the source file `file`, of `bytes` bytes.
inline FileBlueprint whole_copy(std::string path, int file, int64_t bytes) {
  return {.path = std::move(path),
          .kind = FileBlueprint::Kind::kCopy,
          .head = {},
          .storages = {{.dtype = DType::kUInt8,
                        .numel = bytes,
                        .runs = {},
                        .copy = SourceBytes{file, 0, bytes},
                        .literal = {}}}};
}

// All files of a target, what they hold that no source file held ("what: rule"), and what of the
// source the target's format has no place for.
struct TargetFiles {
  std::vector<FileBlueprint> files;
  std::vector<std::string> synthesised;
  std::vector<std::string> skipped;
  std::vector<std::string> beyond;    // what DeepSpeed will refuse to load
  std::vector<std::string> inferred;  // "what: evidence"
};

}  // namespace isoshard::checkpoint
