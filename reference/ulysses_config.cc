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

// owner/name[@revision][:function], as DeepSpeed tells a kernel on a hub:
// ^[^/:]+/[^/:]+(?:@[^/:]+)?(?::[^/:]+)?$
bool names_a_kernel(const std::string& name) {
  const size_t colon = name.find(':');
  const std::string repository = name.substr(0, colon);
  if (colon != std::string::npos) {
    const std::string function = name.substr(colon + 1);
    if (function.empty() || function.find_first_of("/:") != std::string::npos) return false;
  }
  const size_t slash = repository.find('/');
  return slash != std::string::npos && slash > 0 && slash + 1 < repository.size() &&
         repository.find('/', slash + 1) == std::string::npos;
}

int64_t attribute(const std::optional<int64_t>& value, const std::string& name) {
  if (!value) {
    refuse("The model's config lacks an attribute", "AttributeError", name, "a number", "none");
  }
  return *value;
}

UlyssesArguments arguments_of(const RegisterArguments& a, std::optional<int64_t> length) {
  const int64_t heads = attribute(a.config.num_attention_heads, "num_attention_heads");
  const int64_t hidden = attribute(a.config.hidden_size, "hidden_size");
  if (heads < 1) {
    refuse("There are no heads", "ZeroDivisionError", "num_attention_heads", "1 or more",
           text(heads));
  }
  UlyssesArguments arguments{
      .batch_size = a.micro_batch_size,
      .attn_head_count = heads,
      .attn_head_size = a.config.head_dim.value_or(hidden / heads),
      .kv_head_count = attribute(a.config.num_key_value_heads, "num_key_value_heads"),
      .num_hidden_layers = attribute(a.config.num_hidden_layers, "num_hidden_layers"),
      .sequence_parallel_size = a.sequence_parallel_size,
      .seq_length_is_variable = a.seq_length_is_variable,
      .disable_in_eval = a.disable_in_eval};
  if (!a.seq_length_is_variable) {
    arguments.local_seq_length = *length / a.sequence_parallel_size;
    arguments.global_seq_length = length;
  }
  return arguments;
}

void check_group(const Communicator* group, int ranks) {
  if (group == nullptr || group->size() == ranks) return;
  refuse("The process group has other ranks", "nothing; it reads P from the group", "process_group",
         text(ranks) + " ranks", text(group->size()));
}

// As many query heads for each key-value head. Where not, P divides both: a K that divides P
// divides H too.
void check_heads_of_a_group(const UlyssesArguments& a) {
  const int64_t heads = a.attn_head_count, kv_heads = a.kv_head_count;
  if (heads % kv_heads == 0) return;
  const int64_t ranks = a.sequence_parallel_size;
  refuse("The key-value heads do not divide the heads",
         "nothing here; each core attention gets " + text(heads / ranks) + " heads and " +
             text(kv_heads / ranks) + " key-value heads",
         "attn_head_count", "a multiple of " + text(kv_heads),
         text(heads) + " mod " + text(kv_heads) + " = " + text(heads % kv_heads));
}

// [batch, tokens, heads, D], in a context's place.
AttentionContext queries_of(const AttentionCall& call) {
  const HeadTensor& query = call.in.query;
  const HeadSizes& s = query.sizes;
  AttentionContext context{.values = {}, .shape = {s.samples, s.tokens, s.heads, s.size}};
  for (int64_t b = 0; b < s.samples; ++b) {
    for (int64_t t = 0; t < s.tokens; ++t) {
      for (int64_t head = 0; head < s.heads; ++head) {
        const float* at = query.at(b, head, t);
        context.values.insert(context.values.end(), at, at + s.size);
      }
    }
  }
  return context;
}

}  // namespace

UlyssesAttention make_ulysses(const UlyssesArguments& a, Communicator* process_group,
                              CoreAttention attn) {
  const int64_t ranks = a.sequence_parallel_size;
  if (ranks < 1)
    refuse("There are no ranks", "ValueError", "process_group", "1 or more", text(ranks));
  if (a.kv_head_count < 1) {
    refuse("There are no key-value heads", "ZeroDivisionError", "kv_head_count", "1 or more",
           text(a.kv_head_count));
  }
  if (a.attn_head_count % ranks != 0) {
    refuse(
        "The sequence-parallel ranks do not divide the heads", "ValueError", "attn_head_count",
        "a multiple of " + text(ranks),
        text(a.attn_head_count) + " mod " + text(ranks) + " = " + text(a.attn_head_count % ranks));
  }
  if (a.kv_head_count % ranks != 0 && ranks % a.kv_head_count != 0) {
    refuse("Neither the ranks divide the key-value heads nor they the ranks", "ValueError",
           "kv_head_count", "a multiple or a divisor of " + text(ranks), text(a.kv_head_count));
  }
  check_heads_of_a_group(a);
  UlyssesAttention result{.arguments = a, .process_group = process_group, .attn = std::move(attn)};
  result.local_q_head_count = a.attn_head_count / ranks;
  result.kv_replication_factor = ranks / a.kv_head_count;
  result.local_kv_head_count = result.kv_replication_factor > 1 ? 1 : a.kv_head_count / ranks;
  check_group(process_group, a.sequence_parallel_size);
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

std::array<int64_t, 4> UlyssesAttention::required_query_shape() const {
  return {local_length, arguments.batch_size, arguments.attn_head_count, arguments.attn_head_size};
}

std::array<int64_t, 4> UlyssesAttention::required_key_value_shape() const {
  return {local_length, arguments.batch_size, arguments.kv_head_count, arguments.attn_head_size};
}

std::array<int64_t, 3> UlyssesAttention::required_context_shape() const {
  return {global_length, arguments.batch_size, arguments.attn_head_size * local_q_head_count};
}

// The core attention, or in the debug mode what stands for it. Counted behind the exchanges, so
// that a call that is refused before them is none.
AttentionContext UlyssesAttention::attend_layer(const AttentionCall& call,
                                                std::vector<HeadOutputs>* saved) {
  if (!skip_all_but_last_attention_debug_mode) return attn(call, saved);
  rotating_layer_counter = (rotating_layer_counter + 1) % arguments.num_hidden_layers;
  return rotating_layer_counter == 0 ? attn(call, saved) : queries_of(call);
}

Values UlyssesAttention::forward(const HeadTensors& in, const std::vector<int64_t>& positions,
                                 bool training) {
  const int ranks = arguments.sequence_parallel_size;
  UlyssesState state{.samples = arguments.batch_size,
                     .mode = {training, arguments.disable_in_eval}};
  if (!state.mode.bypass()) {
    if (process_group == nullptr && ranks > 1) {
      refuse("There is no process group", "AssertionError", "process_group", text(ranks) + " ranks",
             "none");
    }
    if (skip_all_but_last_attention_debug_mode && arguments.num_hidden_layers < 1) {
      refuse("There are no layers of which to call the last", "ZeroDivisionError",
             "num_hidden_layers", "1 or more", text(arguments.num_hidden_layers));
    }
    if (arguments.seq_length_is_variable) {
      local_length = in.query.sizes.tokens;
      global_length = local_length * ranks;
    }
  }
  UlyssesShape shape{.heads = arguments.attn_head_count,
                     .kv_heads = arguments.kv_head_count,
                     .head_size = arguments.attn_head_size};
  for (int r = 0; r < ranks; ++r) {
    shape.positions.push_back({r * local_length, (r + 1) * local_length});
  }
  const CoreAttention layer = [this](const AttentionCall& call, std::vector<HeadOutputs>* saved) {
    return attend_layer(call, saved);
  };
  return Ulysses(process_group, shape, state.mode.bypass() ? attn : layer)
      .attend(in, positions, &state);
}

// Steps 6 to 9: is there such an attention, and can it do without a mask of every pair.
void UlyssesRegistry::check_name(const RegisterArguments& a) {
  const std::string& name = a.core_attn_implementation;
  std::set<std::string>& names = surroundings_.names;
  if (a.model_is_object && a.config.attn_implementation && *a.config.attn_implementation != name) {
    refuse("The model has another attention", "ValueError", "core_attn_implementation",
           quote(*a.config.attn_implementation), quote(name));
  }
  if (name == "eager" || name == "paged|eager") {
    refuse("This attention needs a mask of every pair of tokens", "ValueError",
           "core_attn_implementation",
           "sdpa, flex_attention, a flash attention or a kernel on a hub", quote(name));
  }
  if (names_a_kernel(name) && !names.contains(name)) {
    if (!surroundings_.load_kernel) {
      refuse("Transformers cannot load kernels", "ImportError", "core_attn_implementation",
             "the name of one it has", quote(name));
    }
    surroundings_.load_kernel(name);
    names.insert(name);
  }
  if (names.contains(name)) return;
  std::string known;
  for (const std::string& other : names) known += (known.empty() ? "" : ", ") + other;
  refuse("There is no such attention", "ValueError", "core_attn_implementation", known,
         quote(name));
}

std::optional<UlyssesAttention> UlyssesRegistry::register_with_transformers(
    const RegisterArguments& a) {
  const int ranks = a.sequence_parallel_size, world = surroundings_.world;
  if (ranks == 1) return std::nullopt;
  std::optional<int64_t> length = a.seq_length;
  if (a.max_length) {
    surroundings_.warn("max_length is deprecated, use seq_length");
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
  if (world < ranks || world % ranks != 0) {
    refuse("The ranks cannot be grouped so", "RuntimeError", "sequence_parallel_size",
           "a divisor of " + text(world) + " ranks", text(ranks));
  }
  check_name(a);
  const std::string& name = a.core_attn_implementation;
  const UlyssesArguments arguments = arguments_of(a, length);
  UlyssesAttention made = make_ulysses(arguments, nullptr, surroundings_.attn);
  if (attention_) {
    if (attention_->arguments == arguments && registered_ == name) return attention_;
    refuse("Sequence parallelism is registered with other arguments",
           "AssertionError, \"already initialized\"", quote(*registered_), "the same arguments",
           quote(name));
  }
  made.core_attn_implementation = name;
  made.process_group = surroundings_.make_groups(ranks);
  check_group(made.process_group, ranks);
  registered_ = name;
  attention_ = std::move(made);
  return attention_;
}

}  // namespace isoshard::reference
