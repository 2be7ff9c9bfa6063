// Where every element of a whole tensor lies in the shards of tensor- or expert-parallel ranks, as
// strided blocks: the "affine map" of deepspeed ≥ 0.19.8 (runtime/tensor_parallel, in files under
// universal_checkpoint_info). Older files state less, and a map is built from what they state.
// Link 3 of the tensor's journey. All numbers count elements.
//
//   row-parallel [4, 6] on 2 ranks:   a a a b b b     rank 0 holds the a's as [4, 3], rank 1 the
//   b's
//                                     a a a b b b     one piece a rank: shape [4, 3],
//                                     a a a b b b     source (0 or 3; strides 6, 1),
//                                     a a a b b b     dest (0; strides 3, 1)
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/dtype.h"

namespace isoshard {

// One block. `source` addresses the flattened whole tensor, `dest` the flattened shard.
struct MapPiece {
  Shape shape;
  int64_t source_offset = 0;
  Shape source_stride;
  int64_t dest_offset = 0;
  Shape dest_stride;
  std::vector<int> locations;  // every rank that holds this very block, sorted; the first counts
  bool operator==(const MapPiece&) const = default;
};

struct RankMap {
  Shape shard_shape;
  std::vector<MapPiece> pieces;
  bool operator==(const RankMap&) const = default;
};

struct AffineMap {
  Shape logical_shape;
  std::vector<RankMap> ranks;
  bool operator==(const AffineMap&) const = default;
};

// Elements [source, source + count) of the whole are elements [dest, dest + count) of the shard.
struct MapRun {
  int64_t source = 0;
  int64_t dest = 0;
  int64_t count = 0;
  bool operator==(const MapRun&) const = default;
};

// The fewest runs of a piece, in row-major order of the block; none is empty.
std::vector<MapRun> piece_runs(const MapPiece& piece);

// All runs of a rank's shard, in the order of the shard, neighbours joined.
std::vector<MapRun> shard_runs(const RankMap& rank);

// The shape is whole on every rank.
AffineMap replicated_map(const Shape& shape, int ranks);

// Sub-parameter i of the axis `dim` is widths[i][0] + widths[i][1] + … long; rank t holds
// widths[i][t] of each, one behind another. A plain split has one sub-parameter.
using Widths = std::vector<std::vector<int64_t>>;
AffineMap split_map(const Shape& shape, size_t dim, const Widths& widths);
int64_t total_width(const std::vector<int64_t>& sub);  // of one sub-parameter
std::string widths_text(const Widths& widths);

// True if every rank holds all of the tensor.
bool is_replicated(const AffineMap& map);

// Why the map cannot be: blocks out of bounds, holes or overlaps in a shard or in the whole. Empty
// if it can. Cost: the number of runs.
std::string why_impossible(const AffineMap& map);

}  // namespace isoshard
