// UlyssesSPAttentionHF: its constructor's arguments and register_with_transformers', their
// defaults, what is derived from them, what is refused, and its forward pass, which is ulysses.h's
// (deepspeed/runtime/sequence_parallel/ulysses_sp.py, 0.19.8). What is refused is refused before
// any group of ranks is made, where DeepSpeed makes them first, but for a group of other ranks than
// asked for; registering again with equal arguments changes nothing.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "core/communicator.h"
#include "reference/ulysses.h"

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

// The object, whichever way it is made. Shapes are [tokens, batch, heads, size].
struct UlyssesAttention {
  UlyssesArguments arguments;
  int64_t local_q_head_count = 0;
  int64_t local_kv_head_count = 0;
  int64_t kv_replication_factor = 0;  // P div K: copies of a key-value head, where above 1
  int64_t local_length = 1;           // 1 stands for a length that each query says
  int64_t global_length = 1;
  Communicator* process_group = nullptr;  // null: one rank, or an object that is only looked at
  CoreAttention attn = core_attention;
  // The name that the core attention has in transformers' registry; none by the constructor.
  std::optional<std::string> core_attn_implementation = {};
  // To see how much memory training takes: of each num_hidden_layers calls of forward, only the
  // last calls the core attention; for the others its context is the queries.
  bool skip_all_but_last_attention_debug_mode = false;
  int64_t rotating_layer_counter = 0;  // calls in that mode, modulo num_hidden_layers

  // What forward compares outside the bypass: [s, B, H, D], [s, B, K, D] and, of the core
  // attention's context, [S, B, H·D / P]; s and S are local_length and global_length.
  std::array<int64_t, 4> required_query_shape() const;
  std::array<int64_t, 4> required_key_value_shape() const;
  std::array<int64_t, 3> required_context_shape() const;

  // query [batch, H, tokens, D], key and value [batch, K, tokens, D], their tokens' positions
  // [batch, tokens], or [1, tokens] for the whole batch; `training`: of the module that calls.
  // Returns [batch, tokens, H·D]. DeepSpeed asserts and gathers position_ids before it compares
  // shapes; here shapes come first and nothing is sent.
  // In evaluation with disable_in_eval the core attention gets these very tensors, of any shape and
  // with positions or without, and nothing else happens: lengths stay the last training's, and the
  // process group may be gone. Otherwise a variable length is taken from the query, and
  // Ulysses::attend does the rest and throws what it throws. Without a process group, and in the
  // debug mode without layers (DeepSpeed: ZeroDivisionError), throws Error(kUsage).
  Values forward(const HeadTensors& in, const std::vector<int64_t>& positions, bool training);

 private:
  AttentionContext attend_layer(const AttentionCall& call, std::vector<HeadOutputs>* saved);
};

// Throws Error(kUsage), in this order, and says what DeepSpeed raises: no key-value heads
// (ZeroDivisionError), heads that P does not divide (ValueError), key-value heads of which neither
// P nor they divide the other (ValueError), heads that the key-value heads do not divide (DeepSpeed
// goes on, to its core attention), a process group of other than P ranks (there P is its size), a
// fixed length without lengths (TypeError), lengths of which one is not P times the other
// (DeepSpeed goes on). Without P: ValueError, before all of these.
UlyssesAttention make_ulysses(const UlyssesArguments& arguments,
                              Communicator* process_group = nullptr,
                              CoreAttention attn = core_attention);

// What a model's config says of its attention; it may lack any of it.
struct AttentionConfig {
  std::optional<std::string> attn_implementation = {};
  std::optional<int64_t> hidden_size = {};
  std::optional<int64_t> num_attention_heads = {};
  std::optional<int64_t> num_key_value_heads = {};
  // Absent: hidden_size div num_attention_heads, which must be there in any case.
  std::optional<int64_t> head_dim = {};
  std::optional<int64_t> num_hidden_layers = {};
};

struct RegisterArguments {
  AttentionConfig config;
  // Not a name; then its attn_implementation must be the one asked for.
  bool model_is_object = true;
  // sdpa, flash_attention_2, flash_attention_3, flex_attention, a kernel on a hub, or whatever else
  // stands in the registry; all but eager and paged|eager. Packed documents are honoured under
  // every name, where DeepSpeed leaves it to the core attention.
  std::string core_attn_implementation = "sdpa";
  int sequence_parallel_size = 1;
  int64_t micro_batch_size = 1;
  std::optional<int64_t> seq_length = {};
  bool seq_length_is_variable = true;
  bool disable_in_eval = false;
  std::optional<int64_t> max_length = {};  // deprecated: seq_length
};

// Where attention functions stand by name.
struct RegistrySurroundings {
  std::set<std::string> names;  // as transformers knows them
  int world = 1;
  // Called once, for P ranks; returns the own group, of as many.
  std::function<Communicator*(int)> make_groups;
  // Of what is deprecated.
  std::function<void(const std::string&)> warn = [](const std::string&) {};
  // Loads a kernel by its name, owner/name[@revision][:function], and registers it so; null: this
  // transformers cannot. No part of the name is empty or has a '/' or ':' of its own.
  std::function<void(const std::string&)> load_kernel = nullptr;
  CoreAttention attn = core_attention;  // of every name
};

// What stands in an attention function's place.
class UlyssesRegistry {
 public:
  explicit UlyssesRegistry(RegistrySurroundings surroundings)
      : surroundings_(std::move(surroundings)) {}

  // Nothing with one rank: nothing is checked then and nothing changes. Otherwise what stands in
  // the registry under core_attn_implementation from now on. Throws Error(kUsage) with what
  // DeepSpeed raises: a fixed length without seq_length (ValueError), P below 2 (ValueError), P
  // larger than the world or not dividing it (RuntimeError), a model of another attention
  // (ValueError), `eager` or `paged|eager` (ValueError: a mask of O(n²)), a kernel that cannot be
  // loaded (ImportError), a name that is not registered (ValueError), a config without heads,
  // layers or size (AttributeError), what make_ulysses refuses, other arguments than the first time
  // (AssertionError, "already initialized"), and a made group of other than P ranks: then nothing
  // is registered.
  std::optional<UlyssesAttention> register_with_transformers(const RegisterArguments& arguments);

  // Under which name, if any.
  const std::optional<std::string>& registered() const { return registered_; }

 private:
  void check_name(const RegisterArguments& arguments);

  RegistrySurroundings surroundings_;
  std::optional<std::string> registered_;
  std::optional<UlyssesAttention> attention_;
};

}  // namespace isoshard::reference
