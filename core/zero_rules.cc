// The arithmetic of ZeRO's partitions, one rule a function.
#include "core/zero_rules.h"

#include <algorithm>
#include <numeric>

#include "core/check.h"
#include "core/mutant.h"
#include "core/numbers.h"

namespace isoshard {

FlatSizes flat_sizes(int64_t total, int dp) {
  const int64_t alignment = (mutant("flat_alignment_once") ? 1 : 2) * static_cast<int64_t>(dp);
  const int64_t flat = div_ceil(total, alignment) * alignment;
  return {flat, div_exact(flat, dp)};
}

int64_t partition_padding(int64_t total, int64_t partition, int rank) {
  const int64_t begin = rank * partition;
  if (total <= begin) return partition;
  return std::max<int64_t>(begin + partition - total + mutant("padding_off_by_one"), 0);
}

int64_t bf16_partition_padding(int64_t total, FlatSizes sizes, int dp, int rank) {
  return rank == (mutant("bf16_padding_first_rank") ? 0 : dp - 1) ? sizes.flat - total : 0;
}

int64_t alignment_padding(int64_t offset, int64_t item_size_bytes) {
  const int64_t elements =
      (mutant("alignment_of_32_bytes") ? 32 : 16) / std::gcd<int64_t>(16, item_size_bytes);
  return (elements - offset % elements) % elements;
}

std::vector<int> round_robin_order(int count, int dp) {
  std::vector<int> order;
  for (int bucket = 0; bucket < dp; ++bucket) {
    for (int index = bucket; index < count; index += dp)
      order.push_back(mutant("round_robin_forgotten") ? static_cast<int>(order.size()) : index);
  }
  return order;
}

int64_t slot_size(int64_t numel, int dp) {
  return mutant("slot_floor") ? numel / dp : div_ceil(numel, dp);
}

int64_t slot_used(int64_t numel, int dp, int rank) {
  const int64_t slot = slot_size(numel, dp);
  return std::clamp<int64_t>(numel - (rank + mutant("slot_used_late")) * slot, 0, slot);
}

std::vector<int> sub_group_counts(const std::vector<int64_t>& numels, int dp,
                                  int64_t sub_group_size) {
  int64_t total = 0;
  for (int64_t numel : numels) total += slot_size(numel, dp);
  std::vector<int> counts;
  if (numels.empty()) return counts;
  if (sub_group_size >= total) return {static_cast<int>(numels.size())};
  int64_t filled = 0;
  int count = 0;
  for (size_t i = 0; i < numels.size(); ++i) {
    filled += slot_size(numels[i], dp);
    ++count;
    if (filled >= sub_group_size + mutant("sub_group_closed_late") || i + 1 == numels.size()) {
      counts.push_back(count);
      filled = 0;
      count = 0;
    }
  }
  return counts;
}

}  // namespace isoshard
