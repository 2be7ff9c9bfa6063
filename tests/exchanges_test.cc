// What simulated ranks hand each other in Ulysses' attention beside what real ones do
// (traces/exchanges, recorded by scripts/record_traces.py exchanges): layouts bit for bit,
// attention within a bound.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>

#include "checkpoint/posix_storage.h"
#include "engine/rank_reader.h"
#include "properties/file_bridge.h"
#include "reference/ulysses.h"
#include "reference/ulysses_layout.h"

namespace isoshard {
namespace {

using engine::RankReader;
using nlohmann::json;
using reference::Span;
using reference::Values;

const std::string kFolder = std::string(ISOSHARD_TRACES) + "/exchanges/";

json recorded(const std::string& name) {
  std::ifstream file(kFolder + name);
  return json::parse(file);
}

// ---- Ulysses: UlyssesSPAttentionHF

struct Sizes {
  int ranks = 1;
  int64_t batch = 1, length = 1, heads = 1, kv_heads = 1, size = 1;
  bool single = false;  // each token is its own document: attention is exact
  // Ranks that have the same key-value head.
  int64_t copies() const { return std::max<int64_t>(1, ranks / kv_heads); }
};

Sizes sizes_of(const std::string& text) {
  Sizes s;
  EXPECT_EQ(std::sscanf(text.c_str(), "%d_%ld_%ld_%ld_%ld_%ld", &s.ranks, &s.batch, &s.length,
                        &s.heads, &s.kv_heads, &s.size),
            6);
  s.single = text.ends_with("_single");
  return s;
}

class Tensors {
 public:
  explicit Tensors(const std::string& path) : reader_(disk_, path) {}
  Values get(const std::string& name, int64_t count) {
    return reader_.values(reader_.need(reader_.fields().root(), name), count, name);
  }
  // Operation and elements, in order.
  std::vector<std::pair<std::string, int64_t>> calls() {
    const checkpoint::Fields& fields = reader_.fields();
    std::vector<std::pair<std::string, int64_t>> list;
    for (const auto call : fields.list(reader_.need(fields.root(), "calls"), "calls")) {
      const auto& parts = fields.pickle().items(call);
      list.emplace_back(fields.text(parts[0], "operation"), fields.integer(parts[1], "elements"));
    }
    return list;
  }
  // What each all_to_all_single was given.
  std::vector<Values> sent() {
    std::vector<int64_t> counts;
    int64_t total = 0;
    for (const auto& [name, count] : calls()) {
      if (name != "all_to_all_single") continue;
      counts.push_back(count);
      total += count;
    }
    const Values all = get("sent", total);
    std::vector<Values> parts;
    auto at = all.begin();
    for (const int64_t count : counts) {
      parts.emplace_back(at, at + count);
      at += count;
    }
    return parts;
  }

 private:
  checkpoint::PosixStorage disk_;
  RankReader reader_;
};

// A call of a rank, in the order in which they come.
enum Exchange { kQuery, kKey, kValue, kContext, kUpstream, kDValue, kDKey, kDQuery, kExchanges };
constexpr const char* kNames[] = {"q", "k", "v", "context", "grad_out", "dv", "dk", "dq"};

// Passes everything on, keeps what all_to_all sends and receives; with `instead`, a rank goes on
// with these values in place of what it received.
class Listening : public Communicator {
 public:
  Listening(Communicator& inner, std::vector<Values> instead)
      : inner_(inner), instead_(std::move(instead)) {}
  const std::string& group() const override { return inner_.group(); }
  int rank() const override { return inner_.rank(); }
  int size() const override { return inner_.size(); }
  void all_to_all(std::span<const ConstBuffer> source, std::span<const Buffer> target,
                  CallSite site) override {
    inner_.all_to_all(source, target, site);
    sent.emplace_back();
    received.emplace_back();
    for (const ConstBuffer& part : source) append(&sent.back(), part.data, part.count);
    for (const Buffer& part : target) append(&received.back(), part.data, part.count);
    if (instead_.empty()) return;
    const std::byte* at =
        reinterpret_cast<const std::byte*>(instead_.at(received.size() - 1).data());
    for (const Buffer& part : target) {
      std::copy_n(at, part.size_bytes(), part.data);
      at += part.size_bytes();
    }
  }
  void all_reduce(Buffer values, Reduction reduction, CallSite site) override {
    inner_.all_reduce(values, reduction, site);
  }
  void reduce_scatter(std::span<const ConstBuffer> source, Buffer target, Reduction reduction,
                      CallSite site) override {
    inner_.reduce_scatter(source, target, reduction, site);
  }
  void all_gather(ConstBuffer source, std::span<const Buffer> target, CallSite site) override {
    inner_.all_gather(source, target, site);
  }
  void broadcast(Buffer values, int root, CallSite site) override {
    inner_.broadcast(values, root, site);
  }
  void send(ConstBuffer source, int to, CallSite site) override { inner_.send(source, to, site); }
  void receive(Buffer target, int from, CallSite site) override {
    inner_.receive(target, from, site);
  }
  void barrier(CallSite site) override { inner_.barrier(site); }

  std::vector<Values> sent, received;  // by exchange, the peers in a row

 private:
  static void append(Values* list, const std::byte* data, int64_t count) {
    const float* begin = reinterpret_cast<const float*>(data);
    list->insert(list->end(), begin, begin + count);
  }
  Communicator& inner_;
  std::vector<Values> instead_;
};

// [B, heads, S, D] to a rank's [B, own tokens, heads·D].
Values slice(const Values& whole, const Sizes& s, int64_t heads, Span own) {
  Values part;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t t = own.begin; t < own.end; ++t) {
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t at = ((b * heads + h) * s.length + t) * s.size;
        part.insert(part.end(), whole.begin() + at, whole.begin() + at + s.size);
      }
    }
  }
  return part;
}

// A rank's [B, heads, own tokens, D] to [B, own tokens, heads·D].
Values by_token(const Values& part, const Sizes& s, int64_t heads) {
  Sizes own = s;
  own.length = s.length / s.ranks;
  return slice(part, own, heads, {0, own.length});
}

// Rows [B, S, width] of a rank.
Values rows(const Values& whole, const Sizes& s, int64_t width, Span own) {
  Values part;
  for (int64_t b = 0; b < s.batch; ++b) {
    part.insert(part.end(), whole.begin() + (b * s.length + own.begin) * width,
                whole.begin() + (b * s.length + own.end) * width);
  }
  return part;
}

// On the wire a block of dk and dv is [token, sample, head, D] there and [head, token, sample, D]
// here, where each head is a sum of its own; the same with one head a rank.
Values heads_first(const Values& wire, const Sizes& s) {
  const int64_t heads = std::max<int64_t>(1, s.kv_heads / s.ranks);
  const int64_t rows = s.length / s.ranks * s.batch;
  Values result;
  for (int64_t p = 0; p < s.ranks; ++p) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t row = 0; row < rows; ++row) {
        const auto at = wire.begin() + ((p * rows + row) * heads + h) * s.size;
        result.insert(result.end(), at, at + s.size);
      }
    }
  }
  return result;
}

void expect_same_bits(const Values& found, const Values& expected, const std::string& what) {
  ASSERT_EQ(found.size(), expected.size()) << what;
  for (size_t i = 0; i < found.size(); ++i) {
    // 0 and −0 are told apart.
    ASSERT_EQ(std::bit_cast<uint32_t>(found[i]), std::bit_cast<uint32_t>(expected[i]))
        << what << " at " << i << ": " << found[i] << ", not " << expected[i];
  }
}

// The largest difference, as a part of 1 + |expected|, that attention may have: float32 sums of up
// to 16 products on both sides, so some units in the last place of values near 1.
constexpr double kBound = 2e-6;

class Largest {
 public:
  void expect_within(const Values& found, const Values& expected, const std::string& what) {
    ASSERT_EQ(found.size(), expected.size()) << what;
    for (size_t i = 0; i < found.size(); ++i) {
      const double part = std::abs(static_cast<double>(found[i]) - expected[i]) /
                          (1 + std::abs(static_cast<double>(expected[i])));
      ASSERT_LE(part, kBound) << what << " at " << i;
      largest_ = std::max(largest_, part);
    }
  }
  double value() const { return largest_; }

 private:
  double largest_ = 0;
};

// What ranks make of full.pt.
struct Side {
  Values out, query, key, value;  // [B, own tokens, heads·D]
  std::vector<Values> sent, received;
};

std::vector<Side> ours(const Sizes& s, Tensors* full, const std::vector<Side>* instead,
                       CollectiveTrace* trace) {
  const int64_t each = s.batch * s.length * s.size;
  const Values q = full->get("q", each * s.heads), k = full->get("k", each * s.kv_heads),
               v = full->get("v", each * s.kv_heads), up = full->get("grad_out", each * s.heads),
               document = full->get("positions", s.batch * s.length);
  std::vector<Span> positions;
  for (int rank = 0; rank < s.ranks; ++rank) {
    positions.push_back(reference::even_share(s.length, s.ranks, rank));
  }
  std::vector<Side> sides(static_cast<size_t>(s.ranks));
  sim::Cluster cluster({.sequence = s.ranks}, {.seed = 3});
  cluster.run([&](sim::Rank& rank) {
    const size_t number = static_cast<size_t>(rank.number());
    const Span own = positions[number];
    Listening group(rank.group(GroupKind::kSequence),
                    instead == nullptr ? std::vector<Values>() : (*instead)[number].received);
    reference::Ulysses ulysses(&group, {s.heads, s.kv_heads, s.size, true, positions});
    std::vector<int64_t> places;
    for (const float place : rows(document, s, 1, own)) {
      places.push_back(static_cast<int64_t>(place));
    }
    reference::UlyssesState state{.samples = s.batch};
    state.document_positions = ulysses.gather_positions(places, s.batch);
    const Values out = ulysses.forward(slice(q, s, s.heads, own), slice(k, s, s.kv_heads, own),
                                       slice(v, s, s.kv_heads, own), &state);
    const reference::UlyssesGradients back =
        ulysses.backward(rows(up, s, s.heads * s.size, own), state);
    sides[number] = {out, back.query, back.key, back.value, group.sent, group.received};
  });
  if (trace != nullptr) *trace = cluster.trace();
  return sides;
}

// dk and dv in the wire's order of ours.
std::vector<Side> theirs(const Sizes& s, const std::string& folder) {
  std::vector<Side> sides;
  const int64_t part = s.batch * s.length / s.ranks * s.size;
  for (int rank = 0; rank < s.ranks; ++rank) {
    Tensors real(folder + "rank" + std::to_string(rank) + ".pt");
    Side side{.out = real.get("out", part * s.heads),
              .query = by_token(real.get("dq", part * s.heads), s, s.heads),
              .key = by_token(real.get("dk", part * s.kv_heads), s, s.kv_heads),
              .value = by_token(real.get("dv", part * s.kv_heads), s, s.kv_heads),
              .sent = real.sent(),
              .received = {}};
    for (const Exchange exchange : {kDValue, kDKey}) {
      side.sent.at(exchange) = heads_first(side.sent.at(exchange), s);
    }
    sides.push_back(std::move(side));
  }
  // Rank a receives the block for a from each, in their order.
  for (size_t a = 0; a < sides.size(); ++a) {
    for (size_t i = 0; i < sides[a].sent.size(); ++i) {
      Values received;
      for (const Side& side : sides) {
        const int64_t block = static_cast<int64_t>(side.sent[i].size()) / s.ranks;
        const auto at = side.sent[i].begin() + static_cast<int64_t>(a) * block;
        received.insert(received.end(), at, at + block);
      }
      sides[a].received.push_back(std::move(received));
    }
  }
  return sides;
}

// A rank's part of what one process has in float64, rounded.
Side whole_part(const Sizes& s, Tensors* full, Span own) {
  const int64_t each = s.batch * s.length * s.size;
  return {.out = rows(full->get("out", each * s.heads), s, s.heads * s.size, own),
          .query = slice(full->get("dq", each * s.heads), s, s.heads, own),
          .key = slice(full->get("dk", each * s.kv_heads), s, s.kv_heads, own),
          .value = slice(full->get("dv", each * s.kv_heads), s, s.kv_heads, own),
          .sent = {},
          .received = {}};
}

void expect_near(const Side& found, const Side& expected, Largest* largest) {
  largest->expect_within(found.out, expected.out, "out");
  largest->expect_within(found.query, expected.query, "dq");
  largest->expect_within(found.key, expected.key, "dk");
  largest->expect_within(found.value, expected.value, "dv");
}

class RecordedUlysses : public testing::TestWithParam<const char*> {};

// Every value that is only moved has the bits of the real one: what is sent and received of q, k, v
// and the output's gradient; and, where a rank receives what the real one did, what it makes of the
// context and of the gradients' blocks. (dk and dv with 2 copies of a head are sums of 2, which
// know no order: equal, but a zero may have another sign; sums of 4 are added in the canonical
// order here.) Contexts and gradients are sent in the same places, within the bound; where each
// token is its own document, context and dv are exact and have the same bits.
TEST_P(RecordedUlysses, LayoutsAreOursBitForBit) {
  const Sizes s = sizes_of(GetParam());
  const std::string folder = kFolder + "ulysses_" + GetParam() + "/";
  Tensors full(folder + "full.pt");
  const std::vector<Side> real = theirs(s, folder), found = ours(s, &full, &real, nullptr);
  Largest sent;
  for (size_t rank = 0; rank < real.size(); ++rank) {
    const Side &a = found[rank], &b = real[rank];
    ASSERT_EQ(b.sent.size(), size_t{kExchanges});
    ASSERT_EQ(a.sent.size(), size_t{kExchanges});
    for (size_t i = 0; i < kExchanges; ++i) {
      const std::string what = std::string(kNames[i]) + " of rank " + std::to_string(rank);
      const bool moved = i == kQuery || i == kKey || i == kValue || i == kUpstream;
      const bool exact = moved || (s.single && (i == kContext || i == kDValue));
      if (exact) {
        expect_same_bits(a.sent[i], b.sent[i], what + ", sent");
        expect_same_bits(a.received[i], b.received[i], what + ", received");
      } else {
        sent.expect_within(a.sent[i], b.sent[i], what + ", sent");
      }
    }
    expect_same_bits(a.out, b.out, "out");
    expect_same_bits(a.query, b.query, "dq");
    if (s.copies() == 1) {
      expect_same_bits(a.key, b.key, "dk");
      expect_same_bits(a.value, b.value, "dv");
    } else if (s.copies() == 2) {
      EXPECT_EQ(a.key, b.key);
      EXPECT_EQ(a.value, b.value);
    } else {
      sent.expect_within(a.key, b.key, "dk");
      sent.expect_within(a.value, b.value, "dv");
    }
  }
  std::printf("%s: computed values as sent, largest difference %.2g\n", GetParam(), sent.value());
}

// Attention, grouped heads and packed documents: ours and the real ranks' against autograd in
// float64 on one process, and against each other.
TEST_P(RecordedUlysses, AttentionIsThatOfAutogradInFloat64) {
  const Sizes s = sizes_of(GetParam());
  const std::string folder = kFolder + "ulysses_" + GetParam() + "/";
  Tensors full(folder + "full.pt");
  CollectiveTrace trace;
  const std::vector<Side> real = theirs(s, folder), found = ours(s, &full, nullptr, &trace);
  Largest to_whole, real_to_whole, to_real;
  for (int rank = 0; rank < s.ranks; ++rank) {
    const size_t at = static_cast<size_t>(rank);
    const Side whole = whole_part(s, &full, reference::even_share(s.length, s.ranks, rank));
    expect_near(found[at], whole, &to_whole);
    expect_near(real[at], whole, &real_to_whole);
    expect_near(found[at], real[at], &to_real);
    std::vector<std::pair<std::string, int64_t>> calls;
    for (const TraceEvent& e : trace.events()) {
      if (e.rank != rank) continue;
      calls.emplace_back(e.verb == Verb::kAllToAll ? "all_to_all_single" : name(e.verb), e.count);
    }
    EXPECT_EQ(calls, Tensors(folder + "rank" + std::to_string(rank) + ".pt").calls()) << rank;
  }
  std::printf("%s: largest difference from float64 %.2g (real ranks %.2g), from real ranks %.2g\n",
              GetParam(), to_whole.value(), real_to_whole.value(), to_real.value());
}

INSTANTIATE_TEST_SUITE_P(All, RecordedUlysses,
                         testing::Values("2_1_8_4_4_8", "2_2_12_4_2_4", "4_1_8_4_1_8",
                                         "4_2_8_8_2_4", "2_2_12_4_2_2_packed",
                                         "4_1_16_8_2_4_packed", "2_2_4_4_2_2_single",
                                         "4_1_8_8_2_2_single"));

// ---- Ulysses: DistributedAttention

// Both layouts, heads that ranks share evenly or not. A key-value head with its query heads goes to
// one rank, so query heads are shared out as wider heads.
TEST(RecordedDistributedAttention, LayoutsAreOurs) {
  const json cases = recorded("distributed.json").at("cases");
  int uneven = 0;
  for (const auto& [text, by_rank] : cases.items()) {
    reference::UlyssesSizes kv;
    int64_t heads = 0;
    ASSERT_EQ(std::sscanf(text.c_str(), "%d_%d_%ld_%ld_%ld_%ld_%ld", &kv.ranks, &kv.batch_dim_idx,
                          &kv.batch, &kv.tokens, &heads, &kv.heads, &kv.size),
              7);
    ASSERT_EQ(by_rank.size(), static_cast<size_t>(kv.ranks));
    uneven += kv.heads % kv.ranks != 0;
    reference::UlyssesSizes query = kv;
    query.size = heads / kv.heads * kv.size;
    const auto all = [&](const std::string& name) {
      std::vector<Values> tensors;
      for (const json& rank : by_rank) tensors.push_back(rank.at(name).get<Values>());
      return tensors;
    };
    EXPECT_EQ(scatter_heads(query, all("q")), all("local_q")) << text;
    EXPECT_EQ(scatter_heads(kv, all("k")), all("local_k")) << text;
    EXPECT_EQ(scatter_heads(kv, all("v")), all("local_v")) << text;
    EXPECT_EQ(scatter_sequence(query, all("local_out")), all("out")) << text;
    EXPECT_EQ(scatter_heads(query, all("grad_out")), all("local_dout")) << text;
    EXPECT_EQ(scatter_sequence(query, all("local_dq")), all("dq")) << text;
    EXPECT_EQ(scatter_sequence(kv, all("local_dk")), all("dk")) << text;
    EXPECT_EQ(scatter_sequence(kv, all("local_dv")), all("dv")) << text;
  }
  EXPECT_EQ(cases.size(), 12u);
  EXPECT_EQ(uneven, 8);
}

}  // namespace
}  // namespace isoshard
