// Laws of the data and of Ulysses. See training_laws.h.
#include <bit>
#include <map>
#include <set>

#include "core/random.h"
#include "properties/training_laws.h"
#include "reference/ulysses.h"

namespace isoshard::properties {
namespace {

using reference::DataConfig;
using reference::HeadShare;
using reference::Span;
using reference::Values;

DataConfig draw_data(const Draw& draw) {
  DataConfig data;
  data.seed = static_cast<uint64_t>(draw(1, 1000000));
  data.sequence_length = draw(1, 12);
  data.batch = draw(1, 9);
  data.micro_batch = draw(1, 4);
  data.strided = draw(0, 1) == 1;
  data.packed = draw(0, 1) == 1;
  data.masked = static_cast<int>(draw(0, 3));
  return data;
}

bool same_bits(const Values& a, const Values& b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), [](float x, float y) {
           return std::bit_cast<uint32_t>(x) == std::bit_cast<uint32_t>(y);
         });
}

}  // namespace

// Over two steps on two topologies, every sample of the run's order goes to exactly one data-
// parallel rank, and every position of it to exactly one sequence-parallel rank.
std::string each_sample_is_consumed_once(const Draw& draw, TrainingMutant mutant) {
  const DataConfig data = draw_data(draw);
  std::map<int64_t, int> seen;
  for (int64_t step = 0; step < 2; ++step) {
    const int ranks = static_cast<int>(draw(1, 6)), slices = static_cast<int>(draw(1, 5));
    reference::BatchPlan plan = plan_batch(data, ranks);
    if (mutant == TrainingMutant::kSampleTwice && ranks > 1) plan[1] = plan[0];
    std::set<size_t> lengths;
    for (const auto& micros : plan) {
      lengths.insert(micros.size());
      int64_t last = -1;
      for (const auto& micro : micros) {
        if (static_cast<int64_t>(micro.size()) > data.micro_batch) return "a micro batch too large";
        for (const int64_t place : micro) {
          if (place <= last) return "the samples of a rank are not in ascending order";
          last = place;
          ++seen[step * data.batch + place];
        }
      }
    }
    if (lengths.size() != 1) return "ranks have different numbers of micro steps";
    int64_t at = 0;
    for (int rank = 0; rank < slices; ++rank) {
      const Span span = positions_of(data, slices, rank);
      if (span.begin != at) return "slices of positions overlap or leave some out";
      at = span.end;
    }
    if (at != data.sequence_length) return "slices end early";
  }
  for (int64_t sample = 0; sample < 2 * data.batch; ++sample) {
    if (seen[sample] == 1) continue;
    return "sample " + std::to_string(sample) + " is consumed " + std::to_string(seen[sample]) +
           " times";
  }
  return seen.size() == static_cast<size_t>(2 * data.batch) ? "" : "samples of another step";
}

// The label of a token is the next token of the sample, whatever slice the two lie in; none behind
// the last one and at the end of a document.
std::string slices_have_the_samples_labels(const Draw& draw, TrainingMutant mutant) {
  DataConfig data = draw_data(draw);
  data.masked = 0;
  const int64_t sample = draw(0, 50), vocabulary = draw(2, 30);
  const int slices = static_cast<int>(draw(1, 5));
  for (int rank = 0; rank < slices; ++rank) {
    const Span span = positions_of(data, slices, rank);
    for (int64_t g = span.begin; g < span.end; ++g) {
      int64_t label = label_of(data, vocabulary, sample, g);
      if (mutant == TrainingMutant::kShiftedPosition && g + 1 == span.end) {
        label = reference::kIgnored;
      }
      const bool last = g + 1 == data.sequence_length || position_of(data, sample, g + 1) == 0;
      const int64_t expected =
          last ? reference::kIgnored : token_of(data, vocabulary, sample, g + 1);
      if (label != expected) return "position " + std::to_string(g) + " has another label";
    }
  }
  return "";
}

// Query heads are shared out once each; every rank has the key-value heads of its query heads.
std::string heads_are_shared_out(const Draw& draw, TrainingMutant mutant) {
  const int64_t kv_heads = draw(1, 8), each = draw(1, 5), heads = kv_heads * each;
  const int ranks = static_cast<int>(draw(1, 16));
  std::vector<HeadShare> shares = reference::share_heads(heads, kv_heads, ranks);
  if (mutant == TrainingMutant::kNeighbourHeads && ranks > 1) std::swap(shares[0], shares[1]);
  int64_t at = 0;
  for (const HeadShare& share : shares) {
    if (share.query.size() < 0 || share.query.begin != at) {
      if (share.query.size() != 0) return "query heads overlap or are left out";
    }
    at = std::max(at, share.query.end);
    for (int64_t head = share.query.begin; head < share.query.end; ++head) {
      const int64_t kv = head / each;
      if (kv < share.key_value.begin || kv >= share.key_value.end) {
        return "a rank lacks the key-value head of a query head";
      }
    }
    if (share.key_value.size() > share.query.size()) return "a rank has heads it does not need";
  }
  if (heads % ranks == 0 && (kv_heads % ranks == 0 || ranks % kv_heads == 0)) {
    for (const HeadShare& share : shares) {  // what UlyssesSPAttentionHF does
      if (share.query.size() != heads / ranks) return "shares differ where they need not";
    }
  }
  return at == heads ? "" : "query heads are left out";
}

namespace {

struct Exchanged {
  Values context, query, key, value;  // [samples, length, heads, D], of all ranks together
  size_t events = 0;
};

// Rows of a token in [samples, tokens, width] of one rank's slice, put where they belong.
void place(const Values& part, Span span, int64_t samples, int64_t length, int64_t width,
           Values* whole) {
  whole->resize(static_cast<size_t>(samples * length * width));
  for (int64_t b = 0; b < samples; ++b) {
    for (int64_t t = 0; t < span.size(); ++t) {
      std::copy_n(part.begin() + (b * span.size() + t) * width, width,
                  whole->begin() + (b * length + span.begin + t) * width);
    }
  }
}

Values slice(const Values& whole, Span span, int64_t samples, int64_t length, int64_t width) {
  Values part;
  for (int64_t b = 0; b < samples; ++b) {
    const auto row = whole.begin() + (b * length + span.begin) * width;
    part.insert(part.end(), row, row + span.size() * width);
  }
  return part;
}

struct UlyssesInputs {
  int64_t samples, heads, kv_heads, size;
  bool causal;
  DataConfig data;
  Values query, key, value, upstream;
};

Exchanged run_ulysses(const UlyssesInputs& in, int ranks, uint64_t seed, TrainingMutant mutant) {
  Exchanged out;
  const int64_t length = in.data.sequence_length;
  sim::Cluster cluster({.sequence = ranks}, {.seed = seed});
  cluster.run([&](sim::Rank& rank) {
    reference::UlyssesShape shape{
        .heads = in.heads, .kv_heads = in.kv_heads, .head_size = in.size, .causal = in.causal};
    for (int r = 0; r < ranks; ++r) shape.positions.push_back(positions_of(in.data, ranks, r));
    const Span span = shape.positions[static_cast<size_t>(rank.number())];
    reference::Ulysses ulysses(ranks == 1 ? nullptr : &rank.group(GroupKind::kSequence), shape);
    std::vector<int64_t> positions;
    for (int64_t b = 0; b < in.samples; ++b) {
      for (int64_t g = span.begin; g < span.end; ++g) {
        positions.push_back(position_of(in.data, b, g));
      }
    }
    reference::UlyssesState state{.samples = in.samples};
    state.document_positions = ulysses.gather_positions(positions, in.samples);
    const int64_t q = in.heads * in.size, kv = in.kv_heads * in.size;
    const auto own = [&](const Values& whole, int64_t width) {
      return slice(whole, span, in.samples, length, width);
    };
    Values context = ulysses.forward(own(in.query, q), own(in.key, kv), own(in.value, kv), &state);
    if (mutant == TrainingMutant::kLostToken && ranks > 1 && !context.empty()) {
      std::fill_n(context.begin(), q, 0.0f);
    }
    reference::UlyssesGradients g = ulysses.backward(own(in.upstream, q), state);
    if (mutant == TrainingMutant::kUnsummedGroup && ranks > in.kv_heads && !g.key.empty()) {
      for (float& value : g.key) value *= 0.5f;
    }
    place(context, span, in.samples, length, q, &out.context);
    place(g.query, span, in.samples, length, q, &out.query);
    place(g.key, span, in.samples, length, kv, &out.key);
    place(g.value, span, in.samples, length, kv, &out.value);
  });
  out.events = cluster.trace().events().size();
  return out;
}

}  // namespace

// Attention over P sequence-parallel ranks is attention on one, forward and backward, bit for bit:
// MHA, GQA and MQA, fewer and more key-value heads than ranks, uneven heads and tokens, packed
// documents, causal and not; and with one rank nothing is sent.
std::string ulysses_is_attention(const Draw& draw, TrainingMutant mutant) {
  UlyssesInputs in{};
  in.kv_heads = draw(1, 4);
  in.heads = in.kv_heads * draw(1, 4);
  in.size = draw(1, 4);
  in.samples = draw(1, 3);
  in.causal = draw(0, 1) == 0;
  in.data = {.seed = static_cast<uint64_t>(draw(1, 100000)), .sequence_length = draw(1, 9)};
  in.data.packed = draw(0, 1) == 1;
  const int ranks = static_cast<int>(draw(1, 9));
  const uint64_t seed = static_cast<uint64_t>(draw(1, 1000000));
  const auto values = [&](int64_t heads, uint64_t stream) {
    Values list(static_cast<size_t>(in.samples * in.data.sequence_length * heads * in.size));
    for (size_t i = 0; i < list.size(); ++i) {
      const uint64_t word = keyed_random(seed, {stream, i});
      list[i] = static_cast<float>(static_cast<int64_t>(word >> 40) - (1 << 23)) * 0x1p-22f;
    }
    return list;
  };
  in.query = values(in.heads, 1);
  in.key = values(in.kv_heads, 2);
  in.value = values(in.kv_heads, 3);
  in.upstream = values(in.heads, 4);
  const Exchanged one = run_ulysses(in, 1, seed, mutant),
                  many = run_ulysses(in, ranks, seed, mutant);
  if (one.events != 0) return "one rank has sent something";
  // Positions, q, k, v, context; and back context, v, k, q.
  const size_t calls = static_cast<size_t>(ranks > 1 ? 9 * ranks : 0);
  if (many.events != calls) return "another number of collectives: " + std::to_string(many.events);
  const std::string where = " over " + std::to_string(ranks) + " ranks, heads " +
                            std::to_string(in.heads) + "/" + std::to_string(in.kv_heads);
  if (!same_bits(one.context, many.context)) return "another context" + where;
  if (!same_bits(one.query, many.query)) return "another dq" + where;
  if (!same_bits(one.key, many.key)) return "another dk" + where;
  if (!same_bits(one.value, many.value)) return "another dv" + where;
  return "";
}

}  // namespace isoshard::properties
