// How the ranks of one axis (tensor, or expert) share a tensor of the state, and which rule of
// DeepSpeed's converter says so (deepspeed/checkpoint/ds_to_universal.py, merge_tp_slices).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "checkpoint/format/pickle.h"
#include "core/affine_map.h"
#include "core/topology.h"

namespace isoshard::checkpoint {

enum class SplitKind {
  kReplicated,    // whole on every rank
  kAveraged,      // whole on every rank, each with values of its own; the mean counts
  kColumn,        // cut along axis 0
  kRow,           // cut along axis 1
  kTwoSubParams,  // two halves of every shard belong to two sub-parameters, cut along axis 0
  kSubParams,     // widths of several sub-parameters along one axis
  kMapped,        // a map that is none of the above
  kExperts,       // whole experts along axis 0
};

const char* name(SplitKind kind);  // "row"

struct TensorSplit {
  Axis axis = Axis::kTensor;
  SplitKind kind = SplitKind::kReplicated;
  AffineMap map;          // of the tensor with its padding
  bool recorded = false;  // the checkpoint holds the map itself: its universal file has no cat_dim
  size_t dim = 0;         // the axis that is cut: column, row, sub-parameters
  Widths widths;          // [sub-parameter][rank] along it
  Shape view;             // sub-parameters: the shape in which `dim` is an axis
  int sub_file = -1;      // file and node of the entry of parameter_with_sub_params
  NodeId sub_entry = kNoNode;
  bool from_count = false;    // that entry counts sub-parameters of equal widths (before 0.4)
  bool equal_shares = false;  // an entry of before 0.4 records no widths: no others can be said
  size_t shard_dims = 0;      // of the shard tensors: a view with more axes is flattened to that
  bool vocabulary = false;    // rows beyond original_rows are padding
  int64_t original_rows = 0;
  int ranks() const { return static_cast<int>(map.ranks.size()); }
};

// The leading axes joined, so that `dims` are left; the shape itself where it has no more.
Shape joined_axes(const Shape& shape, size_t dims);

// The whole tensor's shape without the padding of a vocabulary: as the converter writes it, and
// as the model has it.
Shape converted_shape(const TensorSplit& split);
Shape logical_shape(const TensorSplit& split);

}  // namespace isoshard::checkpoint
