// See zero.h. The rules of the flat buffer and of slots are reference/zero_partition.h's.
#include "reference/zero.h"

#include <algorithm>

#include "core/cast.h"
#include "core/check.h"
#include "reference/zero_partition.h"

namespace isoshard::reference {

GroupCut cut_group(const std::vector<int64_t>& numels, const ZeroForm& form) {
  GroupCut cut;
  if (form.stage == 0) {
    for (size_t i = 0; i < numels.size(); ++i) {
      cut.pieces.push_back({static_cast<int>(i), 0, numels[i], cut.size});
      cut.size += numels[i];
    }
    return cut;
  }
  if (form.stage == 3) {
    for (size_t i = 0; i < numels.size(); ++i) {
      const int64_t slot = (numels[i] + form.ranks - 1) / form.ranks;
      const int64_t begin = std::min(form.rank * slot, numels[i]);
      const int64_t end = std::min(begin + slot, numels[i]);
      cut.pieces.push_back({static_cast<int>(i), begin, end - begin, cut.size});
      cut.size += slot;
    }
    return cut;
  }
  const FlatBuffer buffer = flat_buffer(numels, {.ranks = form.ranks});
  const int64_t first = form.rank * buffer.partition, last = first + buffer.partition;
  for (size_t k = 0; k < buffer.order.size(); ++k) {
    const int parameter = buffer.order[k];
    const int64_t from = std::max(buffer.begin[k], first);
    const int64_t to = std::min(buffer.begin[k] + numels[static_cast<size_t>(parameter)], last);
    if (from >= to) continue;
    cut.pieces.push_back({parameter, from - buffer.begin[k], to - from, from - first});
  }
  cut.size = buffer.partition;
  return cut;
}

Span reduced_slice(const std::vector<int64_t>& numels, int parameter, const ZeroForm& form) {
  const int64_t numel = numels[static_cast<size_t>(parameter)];
  if (form.stage == 0) {
    const int64_t slot = (numel + form.ranks - 1) / form.ranks;
    const int64_t begin = std::min(form.rank * slot, numel);
    return {begin, std::min(begin + slot, numel)};
  }
  for (const BufferPiece& piece : cut_group(numels, form).pieces) {
    if (piece.parameter == parameter) return {piece.begin, piece.begin + piece.count};
  }
  return {0, 0};
}

float rounded(float value, DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return value;
    case DType::kBFloat16:
      return float_from_bfloat16(bfloat16_from_float(value));
    case DType::kFloat16:
      return float_from_half(half_from_float(value));
    default:
      CHECK(false, "not a dtype of parameters");
  }
  return value;
}

}  // namespace isoshard::reference
