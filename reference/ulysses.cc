// See ulysses.h. On the wire every block is [token, sample, head, D], as DeepSpeed's, but for the
// gradients of keys and values on their way back: [head, token, sample, D].
#include "reference/ulysses.h"

#include <algorithm>

#include "core/check.h"
#include "core/error.h"

namespace isoshard::reference {
namespace {

[[noreturn]] void refuse(const std::string& what, const std::string& entry,
                         const std::string& expected, const std::string& found) {
  throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                        .what = what,
                        .entry = entry,
                        .expected = expected,
                        .found = found,
                        .next = "give each rank its slice of the sequence"});
}

std::string list(const std::vector<int64_t>& numbers) {
  std::string text;
  for (const int64_t n : numbers) text += (text.empty() ? "" : ", ") + std::to_string(n);
  return "[" + text + "]";
}

// As DeepSpeed prints it.
std::string text(const HeadSizes& sizes) {
  return "[tokens, batch, heads, size] = " +
         list({sizes.tokens, sizes.samples, sizes.heads, sizes.size});
}

// The context as DeepSpeed compares it: [tokens, samples, heads · D], whatever axes the last one is
// made of. The heads are the rank's own.
void check_context(const AttentionContext& context, const HeadSizes& sizes) {
  const std::vector<int64_t>& shape = context.shape;
  std::vector<int64_t> found = shape;
  if (shape.size() >= 2) {
    found = {shape[1], shape[0], 1};
    for (size_t axis = 2; axis < shape.size(); ++axis) found[2] *= shape[axis];
  }
  const std::vector<int64_t> expected = {sizes.tokens, sizes.samples, sizes.heads * sizes.size};
  if (found == expected && std::ssize(context.values) == sizes.numel()) return;
  refuse("The core attention's context has another shape (DeepSpeed: AssertionError).", "context",
         "[tokens, batch, heads · size] = " + list(expected),
         list(found) + " of " + std::to_string(context.values.size()) + " elements");
}

HeadTensor view(const Values& values, const HeadSizes& sizes) {
  CHECK(static_cast<int64_t>(values.size()) == sizes.numel(), "a view of all the values");
  return {.data = values.data(),
          .sizes = sizes,
          .sample_stride = sizes.heads * sizes.tokens * sizes.size};
}

// [tokens, D] of one sample and head; `copy` holds them if they do not lie together.
const float* rows_of(const HeadTensor& tensor, int64_t sample, int64_t head, Values* copy) {
  const int64_t d = tensor.sizes.size;
  if (tensor.token_stride == d) return tensor.at(sample, head, 0);
  copy->clear();
  for (int64_t t = 0; t < tensor.sizes.tokens; ++t) {
    const float* row = tensor.at(sample, head, t);
    copy->insert(copy->end(), row, row + d);
  }
  return copy->data();
}

void check_positions(std::span<const int64_t> positions, const HeadSizes& sizes) {
  const int64_t found = std::ssize(positions), whole = sizes.samples * sizes.tokens;
  if (found == 0 || found == sizes.tokens || found == whole) return;
  refuse("The positions are not those of the tokens.", "position_ids",
         "none, " + std::to_string(sizes.tokens) + " or " + std::to_string(sizes.samples) + " · " +
             std::to_string(sizes.tokens) + " = " + std::to_string(whole),
         std::to_string(found));
}

// Those of one sample, of positions that check_positions takes.
std::span<const int64_t> sample_positions(std::span<const int64_t> positions, int64_t sample,
                                          int64_t tokens) {
  if (std::ssize(positions) <= tokens) return positions;
  return positions.subspan(static_cast<size_t>(sample * tokens), static_cast<size_t>(tokens));
}

}  // namespace

HeadTensor heads_first(const Values& values, const HeadSizes& sizes) {
  HeadTensor tensor = view(values, sizes);
  tensor.head_stride = sizes.tokens * sizes.size;
  tensor.token_stride = sizes.size;
  return tensor;
}

HeadTensor tokens_first(const Values& values, const HeadSizes& sizes) {
  HeadTensor tensor = view(values, sizes);
  tensor.head_stride = sizes.size;
  tensor.token_stride = sizes.heads * sizes.size;
  return tensor;
}

AttentionContext core_attention(const AttentionCall& call, std::vector<HeadOutputs>* saved) {
  const auto& [query, key, value] = call.in;
  const HeadSizes &s = query.sizes, &kv_sizes = key.sizes;
  const HeadSizes like_query{s.samples, kv_sizes.heads, s.tokens, s.size};
  if (kv_sizes != like_query || value.sizes != like_query) {
    refuse("Query, key and value do not belong together.", "key and value", text(like_query),
           text(kv_sizes) + " and " + text(value.sizes));
  }
  check_positions(call.positions, s);
  Values context(static_cast<size_t>(s.numel())), q, k, v;
  for (int64_t b = 0; b < s.samples; ++b) {
    for (int64_t head = 0; head < s.heads; ++head) {
      const int64_t kv =
          (call.share.query.begin + head) / call.heads_each - call.share.key_value.begin;
      if (kv < 0 || kv >= kv_sizes.heads) {
        refuse("A query head has no key-value head.", "query head " + std::to_string(head),
               std::to_string(call.heads_each) + " query heads each", text(kv_sizes));
      }
      HeadOutputs out =
          attention_forward({.query = rows_of(query, b, head, &q),
                             .key = rows_of(key, b, kv, &k),
                             .value = rows_of(value, b, kv, &v),
                             .length = s.tokens,
                             .size = s.size,
                             .positions = sample_positions(call.positions, b, s.tokens),
                             .causal = call.causal});
      for (int64_t t = 0; t < s.tokens; ++t) {
        std::copy_n(out.context.begin() + t * s.size, s.size,
                    context.begin() + ((b * s.tokens + t) * s.heads + head) * s.size);
      }
      if (saved != nullptr) saved->push_back(std::move(out));
    }
  }
  return {.values = std::move(context), .shape = {s.samples, s.tokens, s.heads, s.size}};
}

std::vector<HeadShare> share_heads(int64_t heads, int64_t kv_heads, int ranks) {
  std::vector<HeadShare> shares;
  CHECK(kv_heads == 0 ? heads == 0 : heads % kv_heads == 0, "whole groups of query heads");
  if (kv_heads == 0) return std::vector<HeadShare>(static_cast<size_t>(ranks));
  const int64_t each = heads / kv_heads;  // query heads of a key-value head
  for (int rank = 0; rank < ranks; ++rank) {
    HeadShare share;
    if (kv_heads >= ranks) {
      share.key_value = even_share(kv_heads, ranks, rank);
      share.query = {share.key_value.begin * each, share.key_value.end * each};
    } else {
      share.query = even_share(heads, ranks, rank);
      if (share.query.size() > 0) {
        share.key_value = {share.query.begin / each, (share.query.end - 1) / each + 1};
      }
    }
    shares.push_back(share);
  }
  return shares;
}

Ulysses::Ulysses(Communicator* group, UlyssesShape shape, CoreAttention core)
    : group_(group),
      shape_(std::move(shape)),
      core_(std::move(core)),
      shares_(share_heads(shape_.heads, shape_.kv_heads, ranks())) {}

std::vector<std::vector<float>> Ulysses::exchange_values(std::vector<std::vector<float>> source,
                                                         const std::vector<int64_t>& counts) {
  if (group_ == nullptr || ranks() == 1) return source;
  return exchange(*group_, source, counts);
}

std::vector<int64_t> Ulysses::gather_positions(const std::vector<int64_t>& own, int64_t samples,
                                               const UlyssesMode& mode) {
  if (mode.bypass()) return own;
  check_group();
  const int64_t tokens = own_tokens(), length = shape_.length();
  const bool each = std::ssize(own) == samples * tokens;
  if (!each && (own.empty() || std::ssize(own) != tokens)) {
    refuse(own.empty() ? "There are no positions (DeepSpeed: AssertionError)."
                       : "There is not one position for each token.",
           "position_ids",
           std::to_string(tokens) + " or " + std::to_string(samples) + " · " +
               std::to_string(tokens) + " = " + std::to_string(samples * tokens),
           std::to_string(own.size()));
  }
  const int64_t rows = each ? samples : 1;
  std::vector<std::vector<int64_t>> parts(static_cast<size_t>(ranks()));
  if (ranks() == 1) {
    parts[0] = own;
  } else {
    std::vector<Buffer> targets;
    for (size_t p = 0; p < parts.size(); ++p) {
      parts[p].resize(static_cast<size_t>(rows * shape_.positions[p].size()));
      targets.push_back(buffer(std::span(parts[p])));
    }
    group_->all_gather(const_buffer(std::span<const int64_t>(own)), targets);
  }
  std::vector<int64_t> all(static_cast<size_t>(rows * length));
  for (size_t p = 0; p < parts.size(); ++p) {
    const Span& span = shape_.positions[p];
    for (int64_t b = 0; b < rows; ++b) {
      std::copy_n(parts[p].begin() + b * span.size(), span.size(),
                  all.begin() + b * length + span.begin);
    }
  }
  return all;
}

// [samples, heads, own tokens, D] → [samples, own heads, length, D].
Values Ulysses::to_heads(const HeadTensor& tokens, bool key_value) {
  const int64_t d = shape_.head_size, own = own_tokens(), length = shape_.length();
  const int64_t samples = tokens.sizes.samples;
  const auto share = [&](int p) {
    const HeadShare& s = shares_[static_cast<size_t>(p)];
    return key_value ? s.key_value : s.query;
  };
  const Span mine = share(rank());
  std::vector<std::vector<float>> source(static_cast<size_t>(ranks()));
  std::vector<int64_t> counts;
  for (int p = 0; p < ranks(); ++p) {
    std::vector<float>& block = source[static_cast<size_t>(p)];
    for (int64_t t = 0; t < own; ++t) {
      for (int64_t b = 0; b < samples; ++b) {
        for (int64_t head = share(p).begin; head < share(p).end; ++head) {
          const float* at = tokens.at(b, head, t);
          block.insert(block.end(), at, at + d);
        }
      }
    }
    counts.push_back(shape_.positions[static_cast<size_t>(p)].size() * samples * mine.size() * d);
  }
  const std::vector<std::vector<float>> received = exchange_values(std::move(source), counts);
  Values out(static_cast<size_t>(samples * mine.size() * length * d));
  for (int p = 0; p < ranks(); ++p) {
    const float* at = received[static_cast<size_t>(p)].data();
    const Span& span = shape_.positions[static_cast<size_t>(p)];
    for (int64_t g = span.begin; g < span.end; ++g) {
      for (int64_t b = 0; b < samples; ++b) {
        for (int64_t head = 0; head < mine.size(); ++head, at += d) {
          std::copy_n(at, d, out.begin() + ((b * mine.size() + head) * length + g) * d);
        }
      }
    }
  }
  return out;
}

// [samples, own query heads, length, D] → [samples, own tokens, H·D].
Values Ulysses::to_tokens(const HeadTensor& heads) {
  const int64_t d = shape_.head_size, own = own_tokens(), samples = heads.sizes.samples;
  const Span mine = shares_[static_cast<size_t>(rank())].query;
  std::vector<std::vector<float>> source(static_cast<size_t>(ranks()));
  std::vector<int64_t> counts;
  for (int p = 0; p < ranks(); ++p) {
    const Span& span = shape_.positions[static_cast<size_t>(p)];
    std::vector<float>& block = source[static_cast<size_t>(p)];
    for (int64_t g = span.begin; g < span.end; ++g) {
      for (int64_t b = 0; b < samples; ++b) {
        for (int64_t head = 0; head < mine.size(); ++head) {
          const float* at = heads.at(b, head, g);
          block.insert(block.end(), at, at + d);
        }
      }
    }
    counts.push_back(own * samples * shares_[static_cast<size_t>(p)].query.size() * d);
  }
  const std::vector<std::vector<float>> received = exchange_values(std::move(source), counts);
  Values out(static_cast<size_t>(samples * own * shape_.heads * d));
  for (int p = 0; p < ranks(); ++p) {
    const float* at = received[static_cast<size_t>(p)].data();
    const Span theirs = shares_[static_cast<size_t>(p)].query;
    for (int64_t t = 0; t < own; ++t) {
      for (int64_t b = 0; b < samples; ++b, at += theirs.size() * d) {
        std::copy_n(at, theirs.size() * d,
                    out.begin() + ((b * own + t) * shape_.heads + theirs.begin) * d);
      }
    }
  }
  return out;
}

// Nodes of the sum over the query heads of one key-value head that a rank can add up by itself.
std::vector<TreeNode> Ulysses::group_nodes(int rank, int64_t kv_head) const {
  const int64_t each = heads_of_a_group();
  const Span& own = shares_[static_cast<size_t>(rank)].query;
  const int64_t begin = std::clamp(own.begin - kv_head * each, int64_t{0}, each);
  const int64_t end = std::clamp(own.end - kv_head * each, int64_t{0}, each);
  return frontier({{static_cast<LeafIndex>(begin), static_cast<LeafIndex>(end)}});
}

// [samples, own query heads, length, D] → [samples, own tokens, K·D], summed over the query heads
// of each key-value head.
Values Ulysses::sum_to_tokens(const Values& per_query_head, int64_t samples) {
  const int64_t d = shape_.head_size, own = own_tokens(), length = shape_.length();
  const int64_t each = heads_of_a_group();
  const HeadShare& mine = shares_[static_cast<size_t>(rank())];
  std::vector<std::vector<float>> source(static_cast<size_t>(ranks()));
  std::vector<int64_t> counts(static_cast<size_t>(ranks()), 0);
  for (int p = 0; p < ranks(); ++p) {
    const Span& span = shape_.positions[static_cast<size_t>(p)];
    const size_t width = static_cast<size_t>(span.size() * samples * d);
    for (int64_t kv = mine.key_value.begin; kv < mine.key_value.end; ++kv) {
      PartialSum sum(group_nodes(rank(), kv), width);
      const int64_t first = std::max(mine.query.begin, kv * each);
      for (int64_t head = first; head < std::min(mine.query.end, (kv + 1) * each); ++head) {
        float* leaf = sum.push_leaf(static_cast<LeafIndex>(head - kv * each));
        for (int64_t g = span.begin; g < span.end; ++g) {
          for (int64_t b = 0; b < samples; ++b, leaf += d) {
            const int64_t row = (b * mine.query.size() + head - mine.query.begin) * length + g;
            std::copy_n(per_query_head.data() + row * d, d, leaf);
          }
        }
      }
      const Values values = sum.finish().values;
      source[static_cast<size_t>(p)].insert(source[static_cast<size_t>(p)].end(), values.begin(),
                                            values.end());
    }
    const Span theirs = shares_[static_cast<size_t>(p)].key_value;
    for (int64_t kv = theirs.begin; kv < theirs.end; ++kv) {
      counts[static_cast<size_t>(p)] +=
          static_cast<int64_t>(group_nodes(p, kv).size()) * own * samples * d;
    }
  }
  const std::vector<std::vector<float>> received = exchange_values(std::move(source), counts);
  const size_t width = static_cast<size_t>(own * samples * d);
  Values out(static_cast<size_t>(samples * own * shape_.kv_heads * d));
  std::vector<const float*> at;
  for (const std::vector<float>& block : received) at.push_back(block.data());
  Values root(width);
  for (int64_t kv = 0; kv < shape_.kv_heads; ++kv) {
    PartialCombiner combiner(width);
    for (int p = 0; p < ranks(); ++p) {
      const Span theirs = shares_[static_cast<size_t>(p)].key_value;
      if (kv < theirs.begin || kv >= theirs.end) continue;
      for (const TreeNode& node : group_nodes(p, kv)) {
        combiner.add(node, at[static_cast<size_t>(p)]);
        at[static_cast<size_t>(p)] += width;
      }
    }
    combiner.finish(root);
    for (int64_t t = 0; t < own; ++t) {
      for (int64_t b = 0; b < samples; ++b) {
        std::copy_n(root.data() + (t * samples + b) * d, d,
                    out.begin() + ((b * own + t) * shape_.kv_heads + kv) * d);
      }
    }
  }
  return out;
}

// What this rank's query head `head` of a sample attends with.
HeadInputs Ulysses::head_inputs(const UlyssesState& state, int64_t sample, int64_t head) const {
  const int64_t length = shape_.length(), size = length * shape_.head_size;
  const HeadShare& mine = shares_[static_cast<size_t>(rank())];
  const int64_t kv = (mine.query.begin + head) / heads_of_a_group() - mine.key_value.begin;
  const int64_t kv_at = (sample * mine.key_value.size() + kv) * size;
  return {.query = state.query.data() + (sample * mine.query.size() + head) * size,
          .key = state.key.data() + kv_at,
          .value = state.value.data() + kv_at,
          .length = length,
          .size = shape_.head_size,
          .positions = sample_positions(state.document_positions, sample, length),
          .causal = shape_.causal};
}

void Ulysses::check_group() const {
  CHECK(group_ == nullptr ? ranks() == 1 : group_->size() == ranks(), "positions for each rank");
}

void Ulysses::check_sizes(const HeadTensors& in, int64_t samples) const {
  check_group();
  const HeadSizes query{samples, shape_.heads, own_tokens(), shape_.head_size};
  const HeadSizes key_value{samples, shape_.kv_heads, own_tokens(), shape_.head_size};
  const auto compare = [](const std::string& name, const HeadSizes& expected,
                          const HeadSizes& found) {
    if (found != expected)
      refuse("A tensor has another shape (DeepSpeed: AssertionError).", name, text(expected),
             text(found));
  };
  compare("query", query, in.query.sizes);
  compare("key", key_value, in.key.sizes);
  compare("value", key_value, in.value.sizes);
}

Values Ulysses::forward(const HeadTensors& in, UlyssesState* state) {
  if (state->mode.bypass()) {
    const int64_t heads = in.query.sizes.heads, groups = in.key.sizes.heads;
    return core_({.in = in,
                  .positions = state->document_positions,
                  .causal = shape_.causal,
                  .share = {{0, heads}, {0, groups}},
                  .heads_each = std::max<int64_t>(1, groups == 0 ? 1 : heads / groups)},
                 nullptr)
        .values;
  }
  const int64_t samples = state->samples, length = shape_.length(), d = shape_.head_size;
  check_sizes(in, samples);
  const HeadShare& mine = shares_[static_cast<size_t>(rank())];
  const HeadSizes own{samples, mine.query.size(), length, d};
  const HeadSizes own_groups{samples, mine.key_value.size(), length, d};
  state->query = to_heads(in.query, false);
  state->key = to_heads(in.key, true);
  state->value = to_heads(in.value, true);
  state->outputs.clear();
  const AttentionContext context = core_({.in = {.query = heads_first(state->query, own),
                                                 .key = heads_first(state->key, own_groups),
                                                 .value = heads_first(state->value, own_groups)},
                                          .positions = state->document_positions,
                                          .causal = shape_.causal,
                                          .share = mine,
                                          .heads_each = heads_of_a_group()},
                                         &state->outputs);
  check_context(context, own);
  return to_tokens(tokens_first(context.values, own));
}

Values Ulysses::forward(const Values& query, const Values& key, const Values& value,
                        UlyssesState* state) {
  const int64_t samples = state->samples;
  const int64_t given = static_cast<int64_t>(state->document_positions.size());
  // In the bypass the rank's tokens are all there are; without heads only the positions count them.
  const int64_t row = samples * shape_.heads * shape_.head_size;
  const int64_t all = row > 0 ? std::ssize(query) / row : given / std::max<int64_t>(1, samples);
  const int64_t tokens = state->mode.bypass() ? all : own_tokens();
  const HeadSizes heads{samples, shape_.heads, tokens, shape_.head_size};
  const HeadSizes groups{samples, shape_.kv_heads, tokens, shape_.head_size};
  return forward({.query = tokens_first(query, heads),
                  .key = tokens_first(key, groups),
                  .value = tokens_first(value, groups)},
                 state);
}

Values Ulysses::attend(const HeadTensors& in, const std::vector<int64_t>& own_positions,
                       UlyssesState* state) {
  if (!state->mode.bypass()) check_sizes(in, state->samples);
  state->document_positions = gather_positions(own_positions, state->samples, state->mode);
  return forward(in, state);
}

UlyssesGradients Ulysses::backward(const Values& context_gradient, const UlyssesState& state) {
  const int64_t samples = state.samples, heads = shares_[static_cast<size_t>(rank())].query.size();
  check_positions(state.document_positions, {samples, heads, shape_.length(), shape_.head_size});
  const HeadSizes own{samples, shape_.heads, own_tokens(), shape_.head_size};
  const Values upstream = to_heads(tokens_first(context_gradient, own), false);
  Values dq, dk, dv;
  for (int64_t b = 0; b < samples; ++b) {
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t number = b * heads + head;
      const HeadGradients g = attention_backward(
          head_inputs(state, b, head), state.outputs[static_cast<size_t>(number)],
          upstream.data() + number * shape_.length() * shape_.head_size);
      dq.insert(dq.end(), g.query.begin(), g.query.end());
      dk.insert(dk.end(), g.key.begin(), g.key.end());
      dv.insert(dv.end(), g.value.begin(), g.value.end());
    }
  }
  UlyssesGradients result;
  // In autograd's order, the last to have been made first.
  result.value = sum_to_tokens(dv, samples);
  result.key = sum_to_tokens(dk, samples);
  result.query = to_tokens(heads_first(dq, {samples, heads, shape_.length(), shape_.head_size}));
  return result;
}

}  // namespace isoshard::reference
