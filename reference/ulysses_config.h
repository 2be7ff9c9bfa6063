// UlyssesSPAttentionHF's arguments: its constructor's and register_with_transformers', their
// defaults, what is derived from them, and what is refused (deepspeed/runtime/sequence_parallel/
// ulysses_sp.py, 0.19.8). What is refused is refused before any group of ranks is made, where
// DeepSpeed makes them first; registering again with equal arguments changes nothing.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <set>
#include <string>

namespace isoshard::reference {

struct UlyssesArguments {
  int64_t batch_size = 1;
  int64_t attn_head_count = 1;  // H
  int64_t attn_head_size = 1;   // D
  int64_t kv_head_count = 1;    // K
  int64_t num_hidden_layers = 1;
  int sequence_parallel_size = 1;  // P, of the process group
  bool seq_length_is_variable = false;
  std::optional<int64_t> local_seq_length = {};
  std::optional<int64_t> global_seq_length = {};
  bool disable_in_eval = false;
  bool operator==(const UlyssesArguments&) const = default;
};

// What the constructor derives. Shapes are [tokens, batch, heads, size].
struct UlyssesAttention {
  UlyssesArguments arguments;
  int64_t local_q_head_count = 0;
  int64_t local_kv_head_count = 0;
  int64_t kv_replication_factor = 0;  // P div K: copies of a key-value head, where above 1
  int64_t local_length = 1;           // 1 stands for a length that each query says
  int64_t global_length = 1;
};

// Throws Error(kUsage), in this order, and says what DeepSpeed raises: heads that P does not divide
// (ValueError), key-value heads of which neither P nor they divide the other (ValueError; none:
// ZeroDivisionError), a fixed length without lengths (TypeError), lengths of which one is not P
// times the other (DeepSpeed goes on).
UlyssesAttention make_ulysses(const UlyssesArguments& arguments);

// What a model's config says of its attention.
struct AttentionConfig {
  std::optional<std::string> attn_implementation = {};
  int64_t hidden_size = 1;
  int64_t num_attention_heads = 1;
  int64_t num_key_value_heads = 1;
  std::optional<int64_t> head_dim = {};
  int64_t num_hidden_layers = 1;
};

struct RegisterArguments {
  AttentionConfig config;
  bool model_is_object =
      true;  // not a name; then its attn_implementation must be the one asked for
  std::string core_attn_implementation = "sdpa";
  int sequence_parallel_size = 1;
  int64_t micro_batch_size = 1;
  std::optional<int64_t> seq_length = {};
  bool seq_length_is_variable = true;
  bool disable_in_eval = false;
  std::optional<int64_t> max_length = {};  // deprecated: seq_length
};

// The attention functions by name, and what stands in one's place.
class UlyssesRegistry {
 public:
  // `names`: as transformers knows them. `make_groups` is called once, for P ranks of `world`;
  // `warn` for what is deprecated.
  UlyssesRegistry(std::set<std::string> names, int world, std::function<void(int)> make_groups,
                  std::function<void(const std::string&)> warn);

  // Nothing with one rank: nothing is checked then and nothing changes. Otherwise what stands in
  // the registry under core_attn_implementation from now on. Throws Error(kUsage) with what
  // DeepSpeed raises: a fixed length without seq_length (ValueError), P below 2 (ValueError), P
  // larger than the world or not dividing it (RuntimeError), a model of another attention
  // (ValueError), `eager` (ValueError: it needs a mask of O(n²)), a name that is not registered
  // (ValueError), what make_ulysses refuses, other arguments than the first time (AssertionError,
  // "already initialized").
  std::optional<UlyssesAttention> register_with_transformers(const RegisterArguments& arguments);

  // Under which name, if any.
  const std::optional<std::string>& registered() const { return registered_; }

 private:
  std::set<std::string> names_;
  int world_;
  std::function<void(int)> make_groups_;
  std::function<void(const std::string&)> warn_;
  std::optional<std::string> registered_;
  std::optional<UlyssesAttention> attention_;
};

}  // namespace isoshard::reference
