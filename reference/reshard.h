// Resharding via whole tensors: gather everything, partition it again. What production does
// direct, file to file, this states in two lines.
#pragma once

#include <cstdint>
#include <vector>

#include "reference/zero_partition.h"

namespace isoshard::reference {

// How the ranks of one job hold one kind of state (masters, or one optimizer state).
struct Form {
  int stage = 1;  // 0 to 3
  int ranks = 1;  // dp·sp
  bool round_robin = false;
  int64_t align_elements = 1;
  int64_t sub_group_size = 1'000'000'000;
};

using Groups = std::vector<std::vector<Bits>>;         // [group][parameter]
using GroupSizes = std::vector<std::vector<int64_t>>;  // likewise, numels
using RankBuffers = std::vector<std::vector<Bits>>;    // [rank][buffer]

// The buffers of a form in order: of which group, and which of its parameters in which order.
struct BufferMembers {
  int group = 0;
  std::vector<int> parameters;
};
std::vector<BufferMembers> buffers_of(const GroupSizes& numels, const Form& form);

// Stage 0: one rank, one buffer a parameter. Stages 1, 2: one a group. Stage 3: one a sub-group.
RankBuffers partition(const Groups& whole, const Form& form, uint32_t padding);
Groups gather(const RankBuffers& buffers, const GroupSizes& numels, const Form& form);

struct Change {
  Form source;
  Form target;
  uint32_t padding = 0;
};
RankBuffers reshard(const RankBuffers& source, const GroupSizes& numels, const Change& change);

}  // namespace isoshard::reference
