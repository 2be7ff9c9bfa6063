// See ulysses.h. On the wire every block is [token, sample, head, D], as DeepSpeed's.
#include "reference/ulysses.h"

#include <algorithm>

#include "core/check.h"

namespace isoshard::reference {
std::vector<HeadShare> share_heads(int64_t heads, int64_t kv_heads, int ranks) {
  std::vector<HeadShare> shares;
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

Ulysses::Ulysses(Communicator* group, UlyssesShape shape)
    : group_(group),
      shape_(std::move(shape)),
      shares_(share_heads(shape_.heads, shape_.kv_heads, ranks())) {
  CHECK(group_ == nullptr ? ranks() == 1 : group_->size() == ranks(), "positions for each rank");
}

std::vector<std::vector<float>> Ulysses::exchange_values(std::vector<std::vector<float>> source,
                                                         const std::vector<int64_t>& counts) {
  if (group_ == nullptr || ranks() == 1) return source;
  return exchange(*group_, source, counts);
}

std::vector<int64_t> Ulysses::gather_positions(const std::vector<int64_t>& own, int64_t samples) {
  const int64_t length = shape_.length();
  std::vector<std::vector<int64_t>> parts(static_cast<size_t>(ranks()));
  if (ranks() == 1) {
    parts[0] = own;
  } else {
    std::vector<Buffer> targets;
    for (size_t p = 0; p < parts.size(); ++p) {
      parts[p].resize(static_cast<size_t>(samples * shape_.positions[p].size()));
      targets.push_back(buffer(std::span(parts[p])));
    }
    group_->all_gather(const_buffer(std::span<const int64_t>(own)), targets);
  }
  std::vector<int64_t> all(static_cast<size_t>(samples * length));
  for (size_t p = 0; p < parts.size(); ++p) {
    const Span& span = shape_.positions[p];
    for (int64_t b = 0; b < samples; ++b) {
      std::copy_n(parts[p].begin() + b * span.size(), span.size(),
                  all.begin() + b * length + span.begin);
    }
  }
  return all;
}

// tokens [samples, own tokens, heads·D] → [samples, own heads, length, D].
Values Ulysses::to_heads(const Values& tokens, int64_t heads, bool key_value, int64_t samples) {
  const int64_t d = shape_.head_size, own = own_tokens(), length = shape_.length();
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
        const float* at = tokens.data() + (b * own + t) * heads * d;
        block.insert(block.end(), at + share(p).begin * d, at + share(p).end * d);
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
Values Ulysses::to_tokens(const Values& heads, int64_t samples) {
  const int64_t d = shape_.head_size, own = own_tokens(), length = shape_.length();
  const Span mine = shares_[static_cast<size_t>(rank())].query;
  std::vector<std::vector<float>> source(static_cast<size_t>(ranks()));
  std::vector<int64_t> counts;
  for (int p = 0; p < ranks(); ++p) {
    const Span& span = shape_.positions[static_cast<size_t>(p)];
    std::vector<float>& block = source[static_cast<size_t>(p)];
    for (int64_t g = span.begin; g < span.end; ++g) {
      for (int64_t b = 0; b < samples; ++b) {
        for (int64_t head = 0; head < mine.size(); ++head) {
          const float* at = heads.data() + ((b * mine.size() + head) * length + g) * d;
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
          .positions = state.document_positions.data() + sample * length,
          .causal = shape_.causal};
}

Values Ulysses::forward(const Values& query, const Values& key, const Values& value,
                        UlyssesState* state) {
  const int64_t samples = state->samples;
  state->query = to_heads(query, shape_.heads, false, samples);
  state->key = to_heads(key, shape_.kv_heads, true, samples);
  state->value = to_heads(value, shape_.kv_heads, true, samples);
  state->outputs.clear();
  Values context;
  for (int64_t b = 0; b < samples; ++b) {
    for (int64_t head = 0; head < shares_[static_cast<size_t>(rank())].query.size(); ++head) {
      state->outputs.push_back(attention_forward(head_inputs(*state, b, head)));
      const Values& own = state->outputs.back().context;
      context.insert(context.end(), own.begin(), own.end());
    }
  }
  return to_tokens(context, samples);
}

UlyssesGradients Ulysses::backward(const Values& context_gradient, const UlyssesState& state) {
  const int64_t samples = state.samples, heads = shares_[static_cast<size_t>(rank())].query.size();
  const Values upstream = to_heads(context_gradient, shape_.heads, false, samples);
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
  result.query = to_tokens(dq, samples);
  return result;
}

}  // namespace isoshard::reference
