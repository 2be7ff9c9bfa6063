// See zero_partition.h. Letters as in the definitions: n numel, T total, F flat, P partition,
// q slot, r rank, dp ranks.
#include "reference/zero_partition.h"

#include <Eigen/Core>

#include "core/check.h"

namespace isoshard::reference {
namespace {

// A flat buffer seen as dp rows of equal length, one row a rank.
using Rows = Eigen::Matrix<uint32_t, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

std::vector<Bits> cut_into_rows(const Bits& flat, int dp) {
  CHECK(flat.size() % static_cast<size_t>(dp) == 0, "rows of equal length");
  const Eigen::Map<const Rows> rows(flat.data(), dp, static_cast<Eigen::Index>(flat.size()) / dp);
  std::vector<Bits> ranks;
  for (int r = 0; r < dp; ++r) {
    Bits& row = ranks.emplace_back(static_cast<size_t>(rows.cols()));
    for (Eigen::Index i = 0; i < rows.cols(); ++i) row[static_cast<size_t>(i)] = rows(r, i);
  }
  return ranks;
}

Bits join_rows(const std::vector<Bits>& ranks) {
  Bits flat;
  for (const Bits& row : ranks) {
    CHECK(row.size() == ranks[0].size(), "rows of equal length");
    flat.insert(flat.end(), row.begin(), row.end());
  }
  return flat;
}

std::vector<int64_t> sizes_of(const std::vector<Bits>& tensors) {
  std::vector<int64_t> numels;
  for (const Bits& tensor : tensors) numels.push_back(static_cast<int64_t>(tensor.size()));
  return numels;
}

}  // namespace

// stage_1_and_2.py, _round_robin_reorder: bucket j holds the parameters with index ≡ j (mod dp) in
// increasing order; the buckets follow one another.
std::vector<int> round_robin(int count, int ranks) {
  std::vector<int> order;
  for (int bucket = 0; bucket < ranks; ++bucket) {
    for (int i = 0; i < count; ++i) {
      if (i % ranks == bucket) order.push_back(i);
    }
  }
  return order;
}

// stage_1_and_2.py, flatten_dense_tensors_aligned: the tensors one behind another. With
// parameter_alignment every one but the last is filled up to a multiple of a elements. F is the
// smallest multiple of 2·dp not below T. (The code's aligned_numel, Σ n + Σ (−n mod a), only
// answers whether the accelerator has room.)
FlatBuffer flat_buffer(const std::vector<int64_t>& numels, const FlatRules& rules) {
  FlatBuffer buffer;
  const int count = static_cast<int>(numels.size());
  if (rules.round_robin) {
    buffer.order = round_robin(count, rules.ranks);
  } else {
    for (int i = 0; i < count; ++i) buffer.order.push_back(i);
  }
  for (int k = 0; k < count; ++k) {
    const int64_t n = numels[static_cast<size_t>(buffer.order[static_cast<size_t>(k)])];
    buffer.begin.push_back(buffer.total);
    buffer.total += n;
    int64_t padding = 0;
    while (k + 1 < count && (buffer.total + padding) % rules.align_elements != 0) ++padding;
    buffer.align_padding.push_back(padding);
    buffer.total += padding;
  }
  const int64_t alignment = 2 * rules.ranks;
  while (buffer.flat < buffer.total) buffer.flat += alignment;
  buffer.partition = buffer.flat / rules.ranks;
  return buffer;
}

// stage_1_and_2.py, get_data_parallel_partitions: rank r owns [r·P, (r+1)·P) of the flat buffer.
std::vector<Bits> partition_flat(const std::vector<Bits>& tensors, const FlatRules& rules,
                                 uint32_t padding) {
  const FlatBuffer buffer = flat_buffer(sizes_of(tensors), rules);
  Bits flat(static_cast<size_t>(buffer.flat), padding);
  for (size_t k = 0; k < buffer.order.size(); ++k) {
    const Bits& tensor = tensors[static_cast<size_t>(buffer.order[k])];
    for (size_t i = 0; i < tensor.size(); ++i) {
      flat[static_cast<size_t>(buffer.begin[k]) + i] = tensor[i];
    }
  }
  return cut_into_rows(flat, rules.ranks);
}

// The inverse: partitions one behind another, then each parameter from where it begins.
std::vector<Bits> gather_flat(const std::vector<Bits>& partitions,
                              const std::vector<int64_t>& numels, const FlatRules& rules) {
  const FlatBuffer buffer = flat_buffer(numels, rules);
  const Bits flat = join_rows(partitions);
  std::vector<Bits> tensors(numels.size());
  for (size_t k = 0; k < buffer.order.size(); ++k) {
    const size_t number = static_cast<size_t>(buffer.order[k]);
    const auto begin = flat.begin() + buffer.begin[k];
    tensors[number].assign(begin, begin + numels[number]);
  }
  return tensors;
}

// tensor_fragment.py, get_hp_fragment_mapping: a parameter at [a, a+n) overlaps rank r in
// [max(a, rP), min(a+n, (r+1)P)); start counts from rP.
std::vector<Slice> slices(const std::vector<int64_t>& numels, const FlatRules& rules, int rank) {
  const FlatBuffer buffer = flat_buffer(numels, rules);
  std::vector<Slice> result;
  const int64_t P = buffer.partition;
  for (size_t k = 0; k < buffer.order.size(); ++k) {
    const int64_t n = numels[static_cast<size_t>(buffer.order[k])];
    int64_t start = -1, count = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = buffer.begin[k] + i;
      if (at < rank * P || at >= (rank + 1) * P) continue;
      if (start < 0) start = at - rank * P;
      ++count;
    }
    if (count > 0) result.push_back({buffer.order[k], start, count});
  }
  return result;
}

// stage_1_and_2.py, __init__, "Record padding required for alignment", L = r·P: P if T <= L;
// L + P − T if T < L + P; else 0.
int64_t group_padding(const FlatBuffer& buffer, int rank) {
  const int64_t P = buffer.partition, T = buffer.total, L = rank * P;
  if (T <= L) return P;
  if (T < L + P) return L + P - T;
  return 0;
}

// bf16_optimizer.py, _setup_for_real_optimizer: F − T on the last rank, 0 on the others.
int64_t group_padding_bf16(const FlatBuffer& buffer, int rank, int ranks) {
  return rank == ranks - 1 ? buffer.flat - buffer.total : 0;
}

// stage3.py, _create_fp16_sub_groups: append a parameter, add its q = ⌈n / dp⌉; close the sub-group
// when the sum has reached sub_group_size, or at the group's last parameter. A group that fits
// whole is one sub-group.
std::vector<std::vector<int>> sub_groups(const std::vector<int64_t>& numels, int ranks,
                                         int64_t sub_group_size) {
  std::vector<std::vector<int>> result;
  std::vector<int> open;
  int64_t sum = 0;
  for (size_t i = 0; i < numels.size(); ++i) {
    int64_t q = numels[i] / ranks;
    if (numels[i] % ranks != 0) ++q;
    open.push_back(static_cast<int>(i));
    sum += q;
    if (sum < sub_group_size && i + 1 < numels.size()) continue;
    result.push_back(std::move(open));
    open.clear();
    sum = 0;
  }
  return result;
}

// partition_parameters.py, _partition_param, and stage3.py, _create_fp32_partitions: a parameter is
// filled up to dp·q elements; rank r's slot is [r·q, (r+1)·q); slots follow one another.
std::vector<Bits> partition_slots(const std::vector<Bits>& tensors, int ranks, uint32_t padding) {
  std::vector<Bits> flats(static_cast<size_t>(ranks));
  for (Bits filled : tensors) {
    while (filled.size() % static_cast<size_t>(ranks) != 0) filled.push_back(padding);
    const std::vector<Bits> rows = cut_into_rows(filled, ranks);
    for (size_t r = 0; r < flats.size(); ++r) {
      flats[r].insert(flats[r].end(), rows[r].begin(), rows[r].end());
    }
  }
  return flats;
}

// The inverse: each rank's slot of a parameter, one behind another, without the tail.
std::vector<Bits> gather_slots(const std::vector<Bits>& flats, const std::vector<int64_t>& numels) {
  const int64_t dp = static_cast<int64_t>(flats.size());
  std::vector<Bits> tensors;
  int64_t slot_begin = 0;
  for (int64_t n : numels) {
    int64_t q = n / dp;
    if (n % dp != 0) ++q;
    Bits tensor;
    for (const Bits& flat : flats) {
      tensor.insert(tensor.end(), flat.begin() + slot_begin, flat.begin() + slot_begin + q);
    }
    tensor.resize(static_cast<size_t>(n));
    tensors.push_back(std::move(tensor));
    slot_begin += q;
  }
  return tensors;
}

}  // namespace isoshard::reference
