// Ulysses sequence parallelism: tokens are exchanged for heads, attention runs on whole sequences,
// and the heads are exchanged back. (Jacobs et al. 2023, arXiv 2309.14509; deepspeed/runtime/
// sequence_parallel/ulysses_sp.py.) With P ranks, s tokens of a sample on each, H heads, K
// key-value heads:
//
//   forward   Y_p[b, head, g] = X_{r(g)}[b, g, head]       for the heads of p; a key-value head
//   goes
//                                                          to every rank with a query head of its
//   backward  the same places the other way; dk and dv of a key-value head are the sum over its
//             query heads, in the canonical order of the heads (tier B), the rest is movement
//
// The exchanges, on every rank in this order: q, k, v, context; and backward context, v, k, q.
// None with one rank, and none in the bypass of evaluation.
#pragma once

#include <cstdint>
#include <vector>

#include "core/communicator.h"
#include "reference/attention.h"

namespace isoshard::reference {

// The heads that a rank computes, and the key-value heads they need.
struct HeadShare {
  Span query;
  Span key_value;
};

// With K >= ranks the key-value heads are shared out, the remainder to the first, and the query
// heads follow them (DeepSpeed's uneven heads); otherwise the query heads are, and a key-value head
// is on every rank that needs it. Ranks may have none.
std::vector<HeadShare> share_heads(int64_t heads, int64_t kv_heads, int ranks);

struct UlyssesShape {
  int64_t heads = 1;  // of all ranks of the group
  int64_t kv_heads = 1;
  int64_t head_size = 2;
  bool causal = true;
  std::vector<Span> positions;  // by rank: its tokens of every sample
  int64_t length() const { return positions.back().end; }
};

// A micro batch on its way through one layer; forward fills it, backward reads it.
struct UlyssesState {
  int64_t samples = 0;
  std::vector<int64_t> document_positions;  // [samples, length]
  Values query, key, value;                 // [samples, own heads, length, D]
  std::vector<HeadOutputs> outputs;         // by sample and own query head
};

struct UlyssesGradients {
  Values query, key, value;  // as forward's inputs
};

class Ulysses {
 public:
  // `group`: null in the bypass and with one rank; then positions has one entry.
  Ulysses(Communicator* group, UlyssesShape shape);

  // Own positions of the samples' tokens, [samples, own tokens], gathered over the group.
  std::vector<int64_t> gather_positions(const std::vector<int64_t>& own, int64_t samples);

  // query [samples, own tokens, H·D], key and value [samples, own tokens, K·D], rotated; returns
  // the context, shaped as query. `state` has samples and document_positions.
  Values forward(const Values& query, const Values& key, const Values& value, UlyssesState* state);
  UlyssesGradients backward(const Values& context_gradient, const UlyssesState& state);

 private:
  int ranks() const { return static_cast<int>(shape_.positions.size()); }
  int rank() const { return group_ == nullptr ? 0 : group_->rank(); }
  int64_t own_tokens() const { return shape_.positions[static_cast<size_t>(rank())].size(); }
  std::vector<std::vector<float>> exchange_values(std::vector<std::vector<float>> source,
                                                  const std::vector<int64_t>& counts);
  Values to_heads(const Values& tokens, int64_t heads, bool key_value, int64_t samples);
  Values to_tokens(const Values& heads, int64_t samples);
  Values sum_to_tokens(const Values& per_query_head, int64_t samples);
  // Query heads of a key-value head; a tensor-parallel rank may have neither.
  int64_t heads_of_a_group() const {
    return shape_.kv_heads == 0 ? 1 : shape_.heads / shape_.kv_heads;
  }
  HeadInputs head_inputs(const UlyssesState& state, int64_t sample, int64_t head) const;
  std::vector<TreeNode> group_nodes(int rank, int64_t kv_head) const;

  Communicator* group_;
  UlyssesShape shape_;
  std::vector<HeadShare> shares_;
};

}  // namespace isoshard::reference
