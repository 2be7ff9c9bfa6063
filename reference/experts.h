// A layer of experts: each token goes to the top k of them by a router, dropless, and expert-
// parallel ranks hold E / ep experts each.
//
//   r = softmax over the chosen of (x · gateᵀ),   y = Σ_chosen r_e · w2_e (silu(w1_e x) ∘ (w3_e x))
//
// The chosen stand in ascending order of the expert, and ties go to the lower one. Tensor-parallel
// ranks have the same tokens; each sends its slice of them, and outputs are gathered. What an
// expert does to a token depends on that token alone, so a token's bits do not depend on where the
// expert is; its gradients are sums over its tokens, absent where a token is not routed to it (tier
// B).
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "core/canonical_sum.h"
#include "core/communicator.h"
#include "reference/contraction.h"

namespace isoshard::reference {

struct Routing {
  std::vector<int64_t> expert;  // [tokens, k], ascending in a row
  Values weight;                // [tokens, k]
};
Routing route(const Values& logits, int64_t tokens, int64_t experts, int64_t top_k);
// Gradient of the logits [tokens, experts] from that of the weights; 0 for those not chosen.
Values route_backward(const Routing& routing, const Values& weight_gradient, int64_t tokens,
                      int64_t experts, int64_t top_k);

struct ExpertShape {
  int64_t hidden = 1;
  int64_t intermediate = 1;
  int64_t experts = 1;
  int64_t top_k = 1;
};

// The rank's stacks: w1 and w3 [E/ep, f, hidden], w2 [E/ep, hidden, f].
struct ExpertWeights {
  const float* w1 = nullptr;
  const float* w2 = nullptr;
  const float* w3 = nullptr;
};

// Where the gradient of a leaf goes: 1, 2 or 3 for w1, w2, w3; the expert's number on this rank.
using ExpertSink = std::function<float*(int stack, int64_t expert, LeafIndex leaf)>;

// Tokens [begin, end) of `tokens` that tensor-parallel rank `lane` of `lanes` sends.
Span lane_tokens(int64_t tokens, int lanes, int lane);

class Experts {
 public:
  Experts(Communicator& expert, Communicator& tensor, ExpertShape shape)
      : expert_(expert), tensor_(tensor), shape_(shape) {}

  // x [tokens, hidden], leaves [tokens]. Returns each chosen expert's output, [tokens, k, hidden].
  Values forward(const Values& x, const std::vector<LeafIndex>& leaves, const Routing& routing,
                 const ExpertWeights& weights);
  // From the gradient of that to the one of x by slot, [tokens, k, hidden]. Follows forward() of
  // the same tokens, which keeps what it needs.
  Values backward(const Values& gradient, const ExpertWeights& weights, const ExpertSink& sink);

 private:
  // What one expert of this rank has to do.
  struct Work {
    struct Item {
      int source = 0;     // member of the expert group
      int64_t place = 0;  // among what came from there
      LeafIndex leaf = 0;
    };
    std::vector<Item> items;  // ascending leaves
    Values x, h1, h3, active;
  };
  void dispatch(const Values& x, const std::vector<LeafIndex>& leaves);
  Values bring_back(std::vector<std::vector<float>> answers);
  Values gather_lanes(const Values& own, int64_t tokens) const;

  Communicator& expert_;
  Communicator& tensor_;
  ExpertShape shape_;
  int64_t tokens_ = 0;
  Routing routing_;
  std::vector<std::vector<int64_t>> sent_;  // by member: token·k + slot
  std::vector<int64_t> received_;           // by member: how many
  std::vector<Work> work_;                  // by expert of this rank
};

}  // namespace isoshard::reference
