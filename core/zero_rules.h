// How ZeRO cuts parameters over the ranks of the partition group (dp·sp ranks). Link 3 of the
// tensor's journey. All numbers count elements.
//
//   stages 1 and 2 (deepspeed/runtime/zero/stage_1_and_2.py): the group's parameters lie one behind
//   another in one flat buffer, padded at the end to a multiple of 2·dp, cut into dp equal pieces.
//
//     | p0        | p1   | p2         | pad |
//     | rank 0      | rank 1      | rank 2  |
//
//   stage 3 (deepspeed/runtime/zero/partition_parameters.py): every parameter is cut by itself into
//   dp slots of ceil(numel/dp); a rank's flat buffer is its slots one behind another.
//
//     rank 0: | p0 slot | p1 slot | p2 slot |     padding stands at the end of the last slots
#pragma once

#include <cstdint>
#include <vector>

namespace isoshard {

struct FlatSizes {
  int64_t flat = 0;       // padded length of the group's buffer
  int64_t partition = 0;  // flat / dp, the length every rank holds
};

// Stages 1 and 2: `total` elements (alignment padding between parameters included), dp ranks.
FlatSizes flat_sizes(int64_t total, int dp);

// Padding elements at the end of rank `rank`'s partition (stage_1_and_2.py, group_paddings).
int64_t partition_padding(int64_t total, int64_t partition, int rank);

// BF16_Optimizer's rule: everything on the last rank, even beyond its partition
// (bf16_optimizer.py).
int64_t bf16_partition_padding(int64_t total, FlatSizes sizes, int dp, int rank);

// Alignment padding after a parameter that ends at `offset`
// (zero_optimization.parameter_alignment).
int64_t alignment_padding(int64_t offset, int64_t item_size_bytes);

// Stage 1/2 with round_robin_gradients: order[k] is the index, in the optimizer's order, of the
// parameter that stands k-th in the flat buffer.
std::vector<int> round_robin_order(int count, int dp);

// Stage 3: length of one rank's slot, and how much of rank `rank`'s slot is not padding.
int64_t slot_size(int64_t numel, int dp);
int64_t slot_used(int64_t numel, int dp, int rank);

// Stage 3: packs one optimizer group greedily; returns the number of parameters in each sub-group.
// A sub-group is closed when its slots reach sub_group_size or the group ends.
std::vector<int> sub_group_counts(const std::vector<int64_t>& numels, int dp,
                                  int64_t sub_group_size);

}  // namespace isoshard
