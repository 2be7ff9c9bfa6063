// See tensor_split.h.
#include "checkpoint/tensor_split.h"

namespace isoshard::checkpoint {

const char* name(SplitKind kind) {
  switch (kind) {
    case SplitKind::kReplicated:
      return "replicated";
    case SplitKind::kAveraged:
      return "averaged";
    case SplitKind::kColumn:
      return "column";
    case SplitKind::kRow:
      return "row";
    case SplitKind::kTwoSubParams:
      return "two sub-parameters";
    case SplitKind::kSubParams:
      return "sub-parameters";
    case SplitKind::kMapped:
      return "affine map";
    case SplitKind::kExperts:
      break;
  }
  return "experts";
}

Shape joined_axes(const Shape& shape, size_t dims) {
  if (dims == 0 || shape.size() <= dims) return shape;
  const auto joined = static_cast<std::ptrdiff_t>(shape.size() - dims + 1);
  Shape result = {numel(Shape(shape.begin(), shape.begin() + joined))};
  result.insert(result.end(), shape.begin() + joined, shape.end());
  return result;
}

Shape converted_shape(const TensorSplit& split) {
  Shape shape = split.map.logical_shape;
  if (split.vocabulary) shape[0] = split.original_rows;
  return shape;
}

Shape logical_shape(const TensorSplit& split) {
  return joined_axes(converted_shape(split), split.shard_dims);
}

}  // namespace isoshard::checkpoint
