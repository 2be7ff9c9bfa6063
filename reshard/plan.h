// The plan: source fragments joined with target runs. It is data, checked for exact cover before a
// byte moves, printed by `isoshard plan`, executed once.
#pragma once

#include <string>
#include <vector>

#include "checkpoint/blueprint.h"
#include "checkpoint/sharded_state.h"
#include "reshard/target_file.h"

namespace isoshard::reshard {

// Bytes [source_offset, +size) of a source file go to target_offset of a target file, cast from one
// dtype to the other (equal: as they are). Sizes in bytes of the source.
struct Transfer {
  int source_file = -1;
  int64_t source_offset = 0;
  int64_t size_bytes = 0;
  int target_file = -1;
  int64_t target_offset = 0;
  int storage = -1;  // of the target file
  DType source_dtype = DType::kUInt8;
  DType target_dtype = DType::kUInt8;
};

struct ReshardPlan {
  std::vector<checkpoint::FileBlueprint> blueprints;
  std::vector<TargetFile> targets;
  std::vector<Transfer> transfers;  // sorted by source file and offset

  int64_t bytes_to_write() const;
  int64_t bytes_to_read() const;  // of payloads that are moved, each counted once
};

// Joins the blueprints with the state. CHECKs that every run lies inside its leaf and storage, that
// runs of a storage do not overlap, and that fragments cover each run exactly once.
ReshardPlan make_plan(const checkpoint::ShardedState& state,
                      std::vector<checkpoint::FileBlueprint> blueprints);

}  // namespace isoshard::reshard
