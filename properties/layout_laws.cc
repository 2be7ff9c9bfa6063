// See laws.h: core/layout.h against the reference, exhaustively for small sizes.
#include <algorithm>

#include "core/layout.h"
#include "properties/laws.h"

namespace isoshard::properties {
namespace {

using reference::Bits;

// Where the reference puts elements 0, 1, … of a tensor that it partitions behind another one.
std::vector<Location> places(const std::vector<Bits>& ranks, int64_t count) {
  std::vector<Location> result(static_cast<size_t>(count), Location{-1, -1});
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    for (size_t at = 0; at < ranks[rank].size(); ++at) {
      const uint32_t element = ranks[rank][at];
      if (element >= result.size()) continue;
      result[element] = {static_cast<int>(rank), static_cast<int64_t>(at)};
    }
  }
  return result;
}

std::string text(const TensorLayout& layout, int64_t element) {
  return "numel " + std::to_string(layout.numel) + ", ranks " + std::to_string(layout.ranks) +
         ", placement " + std::to_string(layout.placement.index()) + ", element " +
         std::to_string(element);
}

std::string check(const TensorLayout& layout, const std::vector<Location>& expected,
                  Mutant mutant) {
  for (int64_t i = 0; i < layout.numel; ++i) {
    if (locate(layout, i) == expected[static_cast<size_t>(i)]) continue;
    return text(layout, i) + ": locate differs from the reference";
  }
  int64_t next = 0;
  int rank = -1;
  for (const RankFragment& f : mutate_fragments(mutant, fragments(layout))) {
    if (f.begin != next || f.count < 1) return text(layout, next) + ": no exact cover";
    if (f.rank == rank) return text(layout, next) + ": two runs where one would do";
    rank = f.rank;
    for (int64_t k = 0; k < f.count; ++k, ++next) {
      const Location found{f.rank, f.offset_local + k};
      if (next >= layout.numel) return text(layout, next) + ": a run leaves the tensor";
      if (found == locate(layout, next)) continue;
      return text(layout, next) + ": fragments differ from locate";
    }
  }
  return next == layout.numel ? "" : text(layout, next) + ": the cover ends early";
}

Bits counted(int64_t count) {
  Bits bits(static_cast<size_t>(count));
  for (size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint32_t>(i);
  return bits;
}

std::string check_placements(int64_t count, int64_t before, int ranks, Mutant mutant) {
  constexpr uint32_t kOther = 0xFFFFFFFF;
  const std::vector<Bits> tensors = {Bits(static_cast<size_t>(before), kOther), counted(count)};
  const reference::FlatRules rules{.ranks = ranks};
  const int64_t partition = reference::flat_buffer({before, count}, rules).partition;
  const TensorLayout flat{count, ranks, FlatShard{before, std::max<int64_t>(partition, 1)}};
  std::string reason =
      check(flat, places(reference::partition_flat(tensors, rules, kOther), count), mutant);
  if (!reason.empty()) return reason;
  const std::vector<Bits> slots = reference::partition_slots(tensors, ranks, kOther);
  const int64_t behind =
      static_cast<int64_t>(reference::partition_slots({tensors[0]}, ranks, 0)[0].size());
  const int64_t slot = static_cast<int64_t>(slots[0].size()) - behind;
  const TensorLayout slotted{count, ranks, SlotShard{behind, std::max<int64_t>(slot, 1)}};
  reason = check(slotted, places(slots, count), mutant);
  if (!reason.empty()) return reason;
  std::vector<Location> whole;
  for (int64_t i = 0; i < count; ++i) whole.push_back({0, before + i});
  return check({count, ranks, Replicated{before}}, whole, mutant);
}

}  // namespace

std::string layouts_are_the_reference(int64_t largest, Mutant mutant) {
  for (int64_t count = 0; count <= largest; ++count) {
    for (int ranks = 1; ranks <= 16; ++ranks) {
      for (const int64_t before : {0, 1, 2, 7, 33}) {
        const std::string reason = check_placements(count, before, ranks, mutant);
        if (!reason.empty()) return reason;
      }
    }
  }
  return "";
}

}  // namespace isoshard::properties
