// Attention of whole sequences, head by head:
//
//   s_ij = (q_i · k_j) / √D      for the j that query i may see
//   p_ij = exp(s_ij − max_j s_ij),  Z_i = Σ_j p_ij,  o_i = (Σ_j p_ij v_j) / Z_i
//
// A query sees the keys of its own document, up to itself if causal. Each head is computed whole,
// so its bits do not depend on who computes it (tier A over sequence-parallel sizes).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "reference/contraction.h"

namespace isoshard::reference {

// One sample and one query head; [S, D] each, row-major.
struct HeadInputs {
  const float* query = nullptr;
  const float* key = nullptr;
  const float* value = nullptr;
  int64_t length = 0;  // S
  int64_t size = 0;    // D
  // Position of each token in its document; 0 begins a new one. length of them, or none: then the
  // sample is one document.
  std::span<const int64_t> positions = {};
  bool causal = true;
};

struct HeadOutputs {
  Values context;        // [S, D]
  Values probabilities;  // [S, S], divided by Z; 0 where a key is not seen
};
HeadOutputs attention_forward(const HeadInputs& in);

struct HeadGradients {
  Values query, key, value;  // [S, D]; key and value of this query head alone
};
// With δ_i = do_i · o_i:  ds_ij = p_ij (do_i · v_j − δ_i),  dq_i = Σ_j ds_ij k_j / √D,
// dk_j = Σ_i ds_ij q_i / √D,  dv_j = Σ_i p_ij do_i.
HeadGradients attention_backward(const HeadInputs& in, const HeadOutputs& out,
                                 const float* context_gradient);

// Rotations by position, half-split: (a, b) → (a·cos − b·sin, b·cos + a·sin) for pairs
// (c, c + D/2) of a head, by the angle position / θ^(2c/D).
class Rotation {
 public:
  Rotation(int64_t head_size, int64_t positions, double theta);
  // `backward` rotates the other way, which is the gradient.
  void apply(float* head, int64_t position, bool backward) const;

 private:
  int64_t half_;
  std::vector<float> sines_, cosines_;  // [positions, D/2]
};

}  // namespace isoshard::reference
