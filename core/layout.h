// A layout says where every element of a tensor lives. locate() is the only truth; fragments() is
// its fast form. Link 2 of the tensor's journey. All numbers count elements.
#pragma once

#include <cstdint>
#include <variant>
#include <vector>

namespace isoshard {

// The whole tensor lies at `offset` of every rank's buffer (stage 0, or a buffer of the model).
struct Replicated {
  int64_t offset = 0;
};

// Stages 1 and 2: the tensor begins at `group_offset` of the group's flat buffer, of which every
// rank holds `partition` elements.
struct FlatShard {
  int64_t group_offset = 0;
  int64_t partition = 1;
};

// Stage 3: the tensor is cut into slots of `slot` elements, one a rank; the slot begins at
// `slot_offset` of every rank's buffer.
struct SlotShard {
  int64_t slot_offset = 0;
  int64_t slot = 1;
};

using Placement = std::variant<Replicated, FlatShard, SlotShard>;

struct TensorLayout {
  int64_t numel = 0;
  int ranks = 1;  // size of the partition group, dp·sp
  Placement placement;
};

struct Location {
  int rank = 0;
  int64_t offset_local = 0;  // in that rank's buffer
  bool operator==(const Location&) const = default;
};

// A run of elements that lies in one piece: tensor elements [begin, begin + count) are the
// elements [offset_local, offset_local + count) of rank's buffer.
struct RankFragment {
  int rank = 0;
  int64_t begin = 0;
  int64_t count = 0;
  int64_t offset_local = 0;
  bool operator==(const RankFragment&) const = default;
};

// Where element `element` (row-major index, 0 <= element < numel) lives. Replicated: on rank 0,
// and at the same offset on every other rank.
Location locate(const TensorLayout& layout, int64_t element);

// All elements, in order, in as few runs as there are; none is empty.
std::vector<RankFragment> fragments(const TensorLayout& layout);

// The one run that lies on `rank` (every placement gives a rank at most one); count 0 if none does.
// Replicated: the whole tensor, on every rank.
RankFragment fragment_on(const TensorLayout& layout, int rank);

}  // namespace isoshard
