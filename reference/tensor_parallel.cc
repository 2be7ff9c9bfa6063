// See tensor_parallel.h.
#include "reference/tensor_parallel.h"

#include <algorithm>

namespace isoshard::reference {
namespace {

size_t axis_of(Cut cut) { return cut == Cut::kRow ? 1 : 0; }

}  // namespace

std::vector<int> owners(const CutRule& rule, int64_t total, int ranks) {
  // An axis is a row of units of `unit` indices, and a rest that the last rank takes.
  int64_t unit = 1;
  if (rule.heads > 0 && total % rule.heads == 0)
    unit = total / rule.heads;
  else if (total >= rule.grain)
    unit = rule.grain;
  std::vector<int64_t> units(static_cast<size_t>(ranks), 0);
  for (int64_t u = 0; unit > 0 && u < total / unit; ++u) ++units[static_cast<size_t>(u % ranks)];
  std::vector<int> result;
  for (int rank = 0; rank < ranks; ++rank) {
    const int64_t held = units[static_cast<size_t>(rank)] * unit;
    for (int64_t i = 0; i < held; ++i) result.push_back(rank);
  }
  while (static_cast<int64_t>(result.size()) < total) result.push_back(ranks - 1);
  return result;
}

std::vector<int> axis_owners(const CutRule& rule, const Shape& shape, int ranks) {
  if (rule.cut == Cut::kWhole) return {};
  if (rule.cut != Cut::kParts) return owners(rule, shape.at(axis_of(rule.cut)), ranks);
  std::vector<int> result;
  for (int64_t rows : rule.parts) {
    const std::vector<int> part = owners(rule, rows, ranks);
    result.insert(result.end(), part.begin(), part.end());
  }
  return result;
}

Shape shard_shape(const CutRule& rule, const Shape& shape, int rank, int ranks) {
  Shape result = shape;
  if (rule.cut == Cut::kWhole) return result;
  const std::vector<int> held = axis_owners(rule, shape, ranks);
  result[axis_of(rule.cut)] = std::count(held.begin(), held.end(), rank);
  return result;
}

Bits shard(const CutRule& rule, const Shape& shape, const Bits& whole, int rank, int ranks) {
  if (rule.cut == Cut::kWhole) return whole;
  const std::vector<int> held = axis_owners(rule, shape, ranks);
  int64_t inner = 1;  // elements behind the axis
  for (size_t i = axis_of(rule.cut) + 1; i < shape.size(); ++i) inner *= shape[i];
  const auto axis = static_cast<int64_t>(held.size());
  Bits result;
  for (size_t element = 0; element < whole.size(); ++element) {
    const int64_t index = static_cast<int64_t>(element) / inner % axis;
    if (held[static_cast<size_t>(index)] == rank) result.push_back(whole[element]);
  }
  return result;
}

}  // namespace isoshard::reference
