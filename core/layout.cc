// The only place that visits Placement.
#include "core/layout.h"

#include <algorithm>

#include "core/check.h"
#include "core/mutant.h"

namespace isoshard {
namespace {

template <typename... Cases>
struct Match : Cases... {
  using Cases::operator()...;
};
template <typename... Cases>
Match(Cases...) -> Match<Cases...>;

}  // namespace

Location locate(const TensorLayout& layout, int64_t element) {
  CHECK(element >= 0, "element is negative");
  CHECK(element < layout.numel || mutant("layout_bounds_dropped"), "element is beyond the tensor");
  return std::visit(
      Match{[&](const Replicated& p) {
              return Location{0, (mutant("layout_offset_dropped") ? 0 : p.offset) + element};
            },
            [&](const FlatShard& p) {
              const int64_t flat = p.group_offset + element;
              return Location{static_cast<int>((flat + mutant("layout_rank_early")) / p.partition),
                              flat % p.partition};
            },
            [&](const SlotShard& p) {
              return Location{
                  static_cast<int>(element / p.slot),
                  (mutant("layout_slot_offset_dropped") ? 0 : p.slot_offset) + element % p.slot};
            }},
      layout.placement);
}

RankFragment fragment_on(const TensorLayout& layout, int rank) {
  return std::visit(
      Match{[&](const Replicated& p) {
              return RankFragment{rank, 0, layout.numel, p.offset};
            },
            [&](const FlatShard& p) {
              const int64_t first = rank * p.partition;
              const int64_t begin = std::max(p.group_offset, first);
              const int64_t end = std::min(p.group_offset + layout.numel,
                                           first + p.partition + mutant("fragment_past_partition"));
              if (begin >= end) return RankFragment{rank, 0, 0, 0};
              return RankFragment{rank, begin - p.group_offset, end - begin, begin - first};
            },
            [&](const SlotShard& p) {
              const int64_t begin = rank * p.slot;
              if (begin >= layout.numel) return RankFragment{rank, 0, 0, 0};
              return RankFragment{
                  rank, begin,
                  mutant("fragment_slot_padding") ? p.slot : std::min(p.slot, layout.numel - begin),
                  p.slot_offset};
            }},
      layout.placement);
}

std::vector<RankFragment> fragments(const TensorLayout& layout) {
  std::vector<RankFragment> result;
  for (int64_t begin = 0; begin < layout.numel;) {
    const Location at = locate(layout, begin);
    // How far the run goes depends on the placement alone: up to the end of the partition or slot.
    const int64_t room = std::visit(
        Match{[&](const Replicated&) { return layout.numel; },
              [&](const FlatShard& p) { return p.partition - at.offset_local; },
              [&](const SlotShard& p) { return p.slot - (at.offset_local - p.slot_offset); }},
        layout.placement);
    const int64_t count = std::min(room, layout.numel - begin);
    CHECK(count > 0, "an empty run");
    CHECK(at.rank < layout.ranks || mutant("fragments_ranks_unchecked"),
          "the layout has too few ranks for the tensor");
    result.push_back({at.rank, begin, count, at.offset_local});
    begin += count;
  }
  return result;
}

}  // namespace isoshard
