// See ulysses_config.h.
#include "reference/ulysses_config.h"

#include "core/error.h"

namespace isoshard::reference {
namespace {

[[noreturn]] void refuse(const std::string& what, const std::string& raised,
                         const std::string& entry, const std::string& expected,
                         const std::string& found) {
  throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                        .what = what + " (DeepSpeed: " + raised + ").",
                        .entry = entry,
                        .expected = expected,
                        .found = found,
                        .next = "change the model or sequence_parallel_size"});
}

std::string text(int64_t value) { return std::to_string(value); }

}  // namespace

UlyssesAttention make_ulysses(const UlyssesArguments& a) {
  const int64_t ranks = a.sequence_parallel_size;
  if (ranks < 1)
    refuse("There are no ranks", "ValueError", "process_group", "1 or more", text(ranks));
  if (a.attn_head_count % ranks != 0) {
    refuse(
        "The sequence-parallel ranks do not divide the heads", "ValueError", "attn_head_count",
        "a multiple of " + text(ranks),
        text(a.attn_head_count) + " mod " + text(ranks) + " = " + text(a.attn_head_count % ranks));
  }
  if (a.kv_head_count < 1) {
    refuse("There are no key-value heads", "ZeroDivisionError", "kv_head_count", "1 or more",
           text(a.kv_head_count));
  }
  if (a.kv_head_count % ranks != 0 && ranks % a.kv_head_count != 0) {
    refuse("Neither the ranks divide the key-value heads nor they the ranks", "ValueError",
           "kv_head_count", "a multiple or a divisor of " + text(ranks), text(a.kv_head_count));
  }
  UlyssesAttention result{.arguments = a};
  result.local_q_head_count = a.attn_head_count / ranks;
  result.kv_replication_factor = ranks / a.kv_head_count;
  result.local_kv_head_count = result.kv_replication_factor > 1 ? 1 : a.kv_head_count / ranks;
  if (a.seq_length_is_variable) return result;
  if (!a.local_seq_length || !a.global_seq_length) {
    refuse("A fixed length is not given", "TypeError", "local_seq_length, global_seq_length",
           "both, or seq_length_is_variable", "none");
  }
  if (*a.local_seq_length * ranks != *a.global_seq_length) {
    refuse("The lengths contradict each other", "nothing; a shape fails later",
           "local_seq_length, global_seq_length", "local · " + text(ranks) + " = global",
           text(*a.local_seq_length) + " and " + text(*a.global_seq_length));
  }
  result.local_length = *a.local_seq_length;
  result.global_length = *a.global_seq_length;
  return result;
}

UlyssesRegistry::UlyssesRegistry(std::set<std::string> names, int world,
                                 std::function<void(int)> make_groups,
                                 std::function<void(const std::string&)> warn)
    : names_(std::move(names)),
      world_(world),
      make_groups_(std::move(make_groups)),
      warn_(std::move(warn)) {}

std::optional<UlyssesAttention> UlyssesRegistry::register_with_transformers(
    const RegisterArguments& a) {
  const int ranks = a.sequence_parallel_size;
  if (ranks == 1) return std::nullopt;
  std::optional<int64_t> length = a.seq_length;
  if (a.max_length) {
    warn_("max_length is deprecated, use seq_length");
    if (!length) length = a.max_length;
  }
  if (!a.seq_length_is_variable && !length) {
    refuse("A fixed length is not given", "ValueError", "seq_length",
           "a length, or seq_length_is_variable", "none");
  }
  if (ranks < 2) {
    refuse("There are too few ranks", "ValueError", "sequence_parallel_size", "2 or more",
           text(ranks));
  }
  if (world_ < ranks || world_ % ranks != 0) {
    refuse("The ranks cannot be grouped so", "RuntimeError", "sequence_parallel_size",
           "a divisor of " + text(world_) + " ranks", text(ranks));
  }
  const std::string& name = a.core_attn_implementation;
  if (a.model_is_object && a.config.attn_implementation && *a.config.attn_implementation != name) {
    refuse("The model has another attention", "ValueError", "core_attn_implementation",
           quote(*a.config.attn_implementation), quote(name));
  }
  if (name == "eager" || name == "paged|eager") {
    refuse("This attention needs a mask of every pair of tokens", "ValueError",
           "core_attn_implementation", "one without, such as sdpa", quote(name));
  }
  if (!names_.contains(name)) {
    std::string known;
    for (const std::string& other : names_) known += (known.empty() ? "" : ", ") + other;
    refuse("There is no such attention", "ValueError", "core_attn_implementation", known,
           quote(name));
  }
  UlyssesArguments arguments{.batch_size = a.micro_batch_size,
                             .attn_head_count = a.config.num_attention_heads,
                             .attn_head_size = a.config.head_dim.value_or(
                                 a.config.hidden_size / a.config.num_attention_heads),
                             .kv_head_count = a.config.num_key_value_heads,
                             .num_hidden_layers = a.config.num_hidden_layers,
                             .sequence_parallel_size = ranks,
                             .seq_length_is_variable = a.seq_length_is_variable,
                             .disable_in_eval = a.disable_in_eval};
  if (!a.seq_length_is_variable) {
    arguments.local_seq_length = *length / ranks;
    arguments.global_seq_length = length;
  }
  const UlyssesAttention made = make_ulysses(arguments);
  if (attention_) {
    if (attention_->arguments == arguments && registered_ == name) return attention_;
    refuse("Sequence parallelism is registered with other arguments",
           "AssertionError, \"already initialized\"", quote(*registered_), "the same arguments",
           quote(name));
  }
  make_groups_(ranks);
  registered_ = name;
  attention_ = made;
  return attention_;
}

}  // namespace isoshard::reference
