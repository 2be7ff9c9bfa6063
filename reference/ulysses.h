// Ulysses sequence parallelism: tokens are exchanged for heads, attention runs on whole sequences,
// and the heads are exchanged back. (Jacobs et al. 2023, arXiv 2309.14509; deepspeed/runtime/
// sequence_parallel/ulysses_sp.py.) With P ranks, s tokens of a sample on each, H heads, K
// key-value heads:
//
//   forward   Y_p[b, head, g] = X_{r(g)}[b, g, head]   for the heads of p; a key-value head goes
//                                                      to every rank with a query head of its
//   backward  the same places the other way; dk and dv of a key-value head are the sum over its
//             query heads, in the canonical order of the heads (tier B), the rest is movement
//
// The exchanges, on every rank in this order: q, k, v, context; and backward context, v, k, q.
// None with one rank. In the bypass of evaluation (disable_in_eval) the core attention is called
// with what the rank was given: nothing is sent, moved or compared.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
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
// is on every rank that needs it. Ranks may have none. The key-value heads divide the heads, and
// without any there are no heads (CheckFailure).
std::vector<HeadShare> share_heads(int64_t heads, int64_t kv_heads, int ranks);

struct HeadSizes {
  int64_t samples = 0;
  int64_t heads = 0;
  int64_t tokens = 0;
  int64_t size = 0;  // D
  int64_t numel() const { return samples * heads * tokens * size; }
  bool operator==(const HeadSizes&) const = default;
};

// A view of heads in any order of axes but the last; the values outlive it. Strides in elements.
struct HeadTensor {
  const float* data = nullptr;
  HeadSizes sizes;
  int64_t sample_stride = 0, head_stride = 0, token_stride = 0;
  const float* at(int64_t sample, int64_t head, int64_t token) const {
    return data + sample * sample_stride + head * head_stride + token * token_stride;
  }
};
HeadTensor heads_first(const Values& values, const HeadSizes& sizes);   // [B, heads, tokens, D]
HeadTensor tokens_first(const Values& values, const HeadSizes& sizes);  // [B, tokens, heads, D]

struct HeadTensors {
  HeadTensor query, key, value;
};

// What the core attention is called with: whole sequences of some heads.
struct AttentionCall {
  HeadTensors in;
  // [samples, tokens]; or [tokens], the same for all samples; or none: a sample is one document.
  std::span<const int64_t> positions = {};
  bool causal = true;
  HeadShare share;         // which of all heads these are
  int64_t heads_each = 1;  // query heads of a key-value head
};
// What it returns. Row-major; [samples, tokens, heads, D], or with other axes behind the first two
// that hold as many elements.
struct AttentionContext {
  Values values;
  std::vector<int64_t> shape;
};
// `saved`, unless null, gets what backward needs, by sample and query head.
using CoreAttention =
    std::function<AttentionContext(const AttentionCall&, std::vector<HeadOutputs>* saved)>;
// attention.h, head by head. Throws Error(kUsage) for tensors that do not belong together, and for
// another number of positions.
AttentionContext core_attention(const AttentionCall& call, std::vector<HeadOutputs>* saved);

// Whether a call is one of training: the attention module's own word, layer by layer.
struct UlyssesMode {
  bool training = true;
  bool disable_in_eval = false;
  bool bypass() const { return !training && disable_in_eval; }
};

struct UlyssesShape {
  int64_t heads = 1;  // of all ranks of the group
  int64_t kv_heads = 1;
  int64_t head_size = 2;
  bool causal = true;
  std::vector<Span> positions;  // by rank: its tokens of every sample
  int64_t length() const { return positions.back().end; }
};

// A micro batch on its way through one layer; forward fills it, backward reads it. In the
// bypass forward leaves it as it is: there is no way back from an evaluation.
struct UlyssesState {
  int64_t samples = 0;
  UlyssesMode mode = {};
  std::vector<int64_t> document_positions;  // as AttentionCall's, of whole sequences
  Values query, key, value;                 // [samples, own heads, length, D]
  std::vector<HeadOutputs> outputs;         // by sample and own query head
};

struct UlyssesGradients {
  Values query, key, value;  // as forward's inputs
};

class Ulysses {
 public:
  // `group`: null with one rank; then positions has one entry. The bypass does not look at it, so
  // it may be gone by then.
  Ulysses(Communicator* group, UlyssesShape shape, CoreAttention core = core_attention);

  // Own positions of the samples' tokens, gathered over the group: [samples, own tokens] become
  // [samples, length]; [1, own tokens], the same for all samples, become [1, length]. All ranks of
  // a group give equally many rows, or the all_gather's counts contradict each other; a rank
  // without tokens counts as [samples, 0]. Throws Error(kUsage) for another number of positions
  // before anything is sent. In the bypass they are returned as they are.
  std::vector<int64_t> gather_positions(const std::vector<int64_t>& own, int64_t samples,
                                        const UlyssesMode& mode = {});

  // The context of the rank's own tokens, [samples, own tokens, H·D]. `state` has samples, mode and
  // document_positions. The first thing decided is the bypass. Otherwise throws Error(kUsage)
  // before anything is sent for tensors of other sizes than [samples, heads, own tokens, D], and
  // behind three exchanges for a context of another shape (DeepSpeed: AssertionError). The shape of
  // the context is the core attention's own word; the order of its values is not verified.
  Values forward(const HeadTensors& in, UlyssesState* state);
  // query [samples, own tokens, H·D], key and value [samples, own tokens, K·D], rotated. In the
  // bypass the query says how many tokens there are.
  Values forward(const Values& query, const Values& key, const Values& value, UlyssesState* state);
  // The same with the positions still to be gathered, behind the comparison of sizes. Throws what
  // gather_positions throws; the bypass does without positions.
  Values attend(const HeadTensors& in, const std::vector<int64_t>& own_positions,
                UlyssesState* state);
  // Throws Error(kUsage) for a number of document_positions that no AttentionCall may have.
  UlyssesGradients backward(const Values& context_gradient, const UlyssesState& state);

 private:
  int ranks() const { return static_cast<int>(shape_.positions.size()); }
  int rank() const { return group_ == nullptr ? 0 : group_->rank(); }
  int64_t own_tokens() const { return shape_.positions[static_cast<size_t>(rank())].size(); }
  void check_group() const;
  void check_sizes(const HeadTensors& in, int64_t samples) const;
  std::vector<std::vector<float>> exchange_values(std::vector<std::vector<float>> source,
                                                  const std::vector<int64_t>& counts);
  Values to_heads(const HeadTensor& tokens, bool key_value);
  Values to_tokens(const HeadTensor& heads);
  Values sum_to_tokens(const Values& per_query_head, int64_t samples);
  // Query heads of a key-value head; a tensor-parallel rank may have neither.
  int64_t heads_of_a_group() const {
    return shape_.kv_heads == 0 ? 1 : shape_.heads / shape_.kv_heads;
  }
  HeadInputs head_inputs(const UlyssesState& state, int64_t sample, int64_t head) const;
  std::vector<TreeNode> group_nodes(int rank, int64_t kv_head) const;

  Communicator* group_;
  UlyssesShape shape_;
  CoreAttention core_;
  std::vector<HeadShare> shares_;
};

}  // namespace isoshard::reference
