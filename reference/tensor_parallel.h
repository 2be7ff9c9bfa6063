// Tensor-parallel shards from their definition: units are dealt to ranks one by one, and a shard is
// collected from the whole tensor index by index. The twin of core/split_rules.h and
// core/affine_map.h. Tier A: elements only move.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "reference/zero_partition.h"

namespace isoshard::reference {

enum class Cut {
  kWhole,   // every rank holds all of it
  kColumn,  // axis 0, the output features
  kRow,     // axis 1, the input features
  kParts,   // several blocks of rows, each cut by itself
};

struct CutRule {
  Cut cut = Cut::kWhole;
  std::vector<int64_t> parts;  // kParts: rows of each block; their sum is the axis
  int64_t heads = 0;           // key-value heads that stay whole; 0: none
  int64_t grain = 1;           // widths are multiples of it, except on the last rank
};

// Which rank holds each index of an axis of `total`.
std::vector<int> owners(const CutRule& rule, int64_t total, int ranks);

// The same for the axis of a tensor that is cut; empty if none is.
std::vector<int> axis_owners(const CutRule& rule, const Shape& shape, int ranks);

Shape shard_shape(const CutRule& rule, const Shape& shape, int rank, int ranks);
Bits shard(const CutRule& rule, const Shape& shape, const Bits& whole, int rank, int ranks);

}  // namespace isoshard::reference
