// See zero.h. The rules of the flat buffer and of slots are reference/zero_partition.h's.
#include "reference/zero.h"

#include <algorithm>

#include "core/mutant.h"
#include "core/numbers.h"
#include "reference/zero_partition.h"

namespace isoshard::reference {

namespace {

GroupCut whole_group(const std::vector<int64_t>& numels) {
  GroupCut cut;
  for (size_t i = 0; i < numels.size(); ++i) {
    cut.pieces.push_back({static_cast<int>(i), 0, numels[i], cut.size});
    cut.size += numels[i];
  }
  return cut;
}

// A slot of every parameter.
GroupCut slots(const std::vector<int64_t>& numels, int ranks, int rank) {
  GroupCut cut;
  for (size_t i = 0; i < numels.size(); ++i) {
    const int64_t slot =
        mutant("reference_slots_floor") ? numels[i] / ranks : div_ceil(numels[i], ranks);
    const int64_t begin = std::min(rank * slot, numels[i]);
    const int64_t end = std::min(begin + slot, numels[i]);
    cut.pieces.push_back({static_cast<int>(i), begin, end - begin, cut.size});
    cut.size += slot;
  }
  return cut;
}

// Partitions of the flat buffer.
std::vector<GroupCut> partitions(const std::vector<int64_t>& numels, int ranks) {
  const FlatBuffer buffer = flat_buffer(numels, {.ranks = ranks});
  std::vector<GroupCut> cuts(static_cast<size_t>(ranks), GroupCut{{}, buffer.partition});
  for (size_t k = 0; k < buffer.order.size(); ++k) {
    const int parameter = buffer.order[k];
    const int64_t begin = buffer.begin[k];
    const int64_t end = begin + numels[static_cast<size_t>(parameter)];
    for (int64_t at = begin; at < end;) {
      const int64_t rank = at / buffer.partition;
      const int64_t to = std::min(end, (rank + 1) * buffer.partition);
      cuts[static_cast<size_t>(rank)].pieces.push_back(
          {parameter, at - begin, to - at, at - rank * buffer.partition});
      at = to;
    }
  }
  return cuts;
}

}  // namespace

std::vector<GroupCut> cut_group(const std::vector<int64_t>& numels, int stage, int ranks) {
  if (stage == 1 || stage == 2) return partitions(numels, ranks);
  std::vector<GroupCut> cuts;
  for (int rank = 0; rank < ranks; ++rank) {
    cuts.push_back(stage == 0 ? whole_group(numels) : slots(numels, ranks, rank));
  }
  return cuts;
}

}  // namespace isoshard::reference
