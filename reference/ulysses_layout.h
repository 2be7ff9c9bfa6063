// DistributedAttention's exchanges as layouts alone, by way of the whole tensor: what each rank
// holds before, and what each holds after (deepspeed/sequence/layer.py, _generate_layout_params and
// uneven_heads_all2all). Link 4 of the tensor's journey, without ranks or messages.
//
//   batch_dim_idx 0   [B, s, H, D]  ⇄  [B, S, h, D]
//   batch_dim_idx 1   [s, B, H, D]  ⇄  [S, B, h, D]      S = P·s, h the rank's heads
//
// scatter heads:     Y_r[b, g, i] = X_{g div s}[b, g mod s, o_r + i]
// scatter sequence:  X_r[b, t, o_p + i] = Y_p[b, r·s + t, i]         its inverse
#pragma once

#include <cstdint>
#include <vector>

#include "reference/contraction.h"
#include "reference/model.h"

namespace isoshard::reference {

struct UlyssesSizes {
  int ranks = 1;
  int64_t batch = 1;
  int64_t tokens = 1;  // s, of one rank
  int64_t heads = 1;   // H, of all ranks
  int64_t size = 1;    // D
  int batch_dim_idx = 0;
};

// The heads of each rank; the remainder goes to the first.
std::vector<Span> head_spans(int64_t heads, int ranks);

// By rank, from all ranks' tensors. Throws Error(kUsage) for a batch_dim_idx other than 0 and 1
// (DeepSpeed: AssertionError) and for tensors of other sizes.
std::vector<Values> scatter_heads(const UlyssesSizes& sizes, const std::vector<Values>& tensors);
std::vector<Values> scatter_sequence(const UlyssesSizes& sizes, const std::vector<Values>& tensors);

}  // namespace isoshard::reference
