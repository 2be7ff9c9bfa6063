// ZeRO partitions from their definition: whole tensors in, every rank's flat buffers out, and back.
// The reading side of the twins: it goes via the whole buffer, so that the production side, which
// goes direct, has something to be compared with. Tier A: elements only move.
//
//   tensors  a a a a a  b b b  c c          group concat, here at 2 ranks
//   flat     a a a a a b b b c c . .        "." is padding, its value given by the caller
//   rank 0   a a a a a b     rank 1   b b c c . .
#pragma once

#include <cstdint>
#include <vector>

namespace isoshard::reference {

// A tensor's elements, row-major, as bit patterns; 16-bit elements lie in the low half.
using Bits = std::vector<uint32_t>;

struct FlatRules {
  int ranks = 1;               // dp, the size of the partition group
  bool round_robin = false;    // round_robin_gradients
  int64_t align_elements = 1;  // parameter_alignment: 16 / gcd(16, item size); 1: off
};

// Where everything stands in the flat buffer of one optimizer group.
struct FlatBuffer {
  std::vector<int> order;              // order[k]: which parameter stands k-th
  std::vector<int64_t> begin;          // of the k-th, in elements of the buffer
  std::vector<int64_t> align_padding;  // elements behind the k-th
  int64_t total = 0;                   // T: elements and alignment padding
  int64_t flat = 0;                    // F: with the padding at the end
  int64_t partition = 0;               // P: F / dp
};

// Elements [start, start + count) of a rank's partition are the parameter's.
struct Slice {
  int parameter = 0;  // index in the optimizer's order
  int64_t start = 0;
  int64_t count = 0;
  bool operator==(const Slice&) const = default;
};

std::vector<int> round_robin(int count, int ranks);
FlatBuffer flat_buffer(const std::vector<int64_t>& numels, const FlatRules& rules);

// Stages 1 and 2 and BF16_Optimizer: one partition of P elements a rank.
std::vector<Bits> partition_flat(const std::vector<Bits>& tensors, const FlatRules& rules,
                                 uint32_t padding);
std::vector<Bits> gather_flat(const std::vector<Bits>& partitions,
                              const std::vector<int64_t>& numels, const FlatRules& rules);

// param_slice_mappings of a rank, as they truly are.
std::vector<Slice> slices(const std::vector<int64_t>& numels, const FlatRules& rules, int rank);

// group_paddings as stages 1 and 2, and as BF16_Optimizer, write them.
int64_t group_padding(const FlatBuffer& buffer, int rank);
int64_t group_padding_bf16(const FlatBuffer& buffer, int rank, int ranks);

// Stage 3: which parameters of one optimizer group share a sub-group.
std::vector<std::vector<int>> sub_groups(const std::vector<int64_t>& numels, int ranks,
                                         int64_t sub_group_size);

// Stage 3: the tensors of one sub-group, each cut into slots; one flat tensor a rank.
std::vector<Bits> partition_slots(const std::vector<Bits>& tensors, int ranks, uint32_t padding);
std::vector<Bits> gather_slots(const std::vector<Bits>& flats, const std::vector<int64_t>& numels);

}  // namespace isoshard::reference
