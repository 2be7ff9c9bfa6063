// Experts of AutoEP folded with AutoTP (deepspeed/module_inject/auto_ep.py and
// runtime/engine.py, 0.19.8; the key `folding`). Tensor-parallel ranks do not share an expert: of
// the W = dp·tp ranks, rank g = d·tp + t is expert-parallel rank g mod ep and replica g div ep.
//
//   dp 2, tp 2, ep 2   rank 0: d0 t0 e0   1: d0 t1 e1   2: d1 t0 e0   3: d1 t1 e1
#pragma once

#include <vector>

#include "checkpoint/deepspeed/merge.h"

namespace isoshard::checkpoint {

// Adds the experts to `whole`, which has the joined dense parameters and groups; `parts` stand by
// tensor-parallel rank. Throws Error(kMismatch) where a file's own `folding` says another place.
void read_folded_experts(ShardedState* whole, const std::vector<MpPart>& parts,
                         const ExpertInfo& experts);

}  // namespace isoshard::checkpoint
