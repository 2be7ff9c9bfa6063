// ZeRO: who owns which elements of the optimizer's state, and one step of it (Rajbhandari et al.
// 2020, arXiv 1910.02054).
//
//   stage 0   everybody everything
//   stage 1   a partition of each group's flat buffer        (stage_1_and_2.py)
//   stage 2   the same, gradients too
//   stage 3   a slot of every parameter, parameters too       (stage3.py)
//
// The gradient that a step uses is  round_dtype(root · loss scale / n)  with the root of the
// canonical sum over all tokens and n the tokens with a loss; then one multiplication takes the
// loss scale out and clips. So its bits do not depend on stage or topology.
#pragma once

#include <cstdint>
#include <vector>

#include "core/training_state.h"
#include "reference/contraction.h"

namespace isoshard::reference {

// Pieces of one rank's buffer, and its size.
struct GroupCut {
  std::vector<BufferPiece> pieces;  // `parameter` counts within the list
  int64_t size = 0;
};
// By rank of `ranks` that share parameters of these sizes.
std::vector<GroupCut> cut_group(const std::vector<int64_t>& numels, int stage, int ranks);

}  // namespace isoshard::reference
