// What simulated ranks say to each other beside what real ones do (traces/exchanges, recorded by
// scripts/record_exchanges.py): Ulysses' attention, value by value and call by call, and the calls
// of a training step of ZeRO 1, 2, 3 and Ulysses, where every difference has its reason here.
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "checkpoint/posix_storage.h"
#include "engine/rank_reader.h"
#include "properties/file_bridge.h"
#include "reference/ulysses.h"

namespace isoshard {
namespace {

using engine::RankReader;
using nlohmann::json;
using reference::Span;
using reference::Values;

const std::string kFolder = std::string(ISOSHARD_TRACES) + "/exchanges/";

// ---- Ulysses

struct Sizes {
  int ranks = 1;
  int64_t batch = 1, length = 1, heads = 1, kv_heads = 1, size = 1;
};

class Tensors {
 public:
  explicit Tensors(const std::string& path) : reader_(disk_, path) {}
  Values get(const std::string& name, int64_t count) {
    return reader_.values(reader_.need(reader_.fields().root(), name), count, name);
  }
  // "all_to_all_single 384".
  std::vector<std::string> calls() {
    const checkpoint::Fields& fields = reader_.fields();
    std::vector<std::string> list;
    for (const auto call : fields.list(reader_.need(fields.root(), "calls"), "calls")) {
      const auto& parts = fields.pickle().items(call);
      list.push_back(fields.text(parts[0], "operation") + " " +
                     std::to_string(fields.integer(parts[1], "elements")));
    }
    return list;
  }

 private:
  checkpoint::PosixStorage disk_;
  RankReader reader_;
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

// A rank's [B, own tokens, heads·D] to [B, heads, own tokens, D].
Values by_head(const Values& part, const Sizes& s, int64_t heads, int64_t tokens) {
  Values result(part.size());
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t from = ((b * tokens + t) * heads + h) * s.size;
        std::copy_n(part.begin() + from, s.size,
                    result.begin() + ((b * heads + h) * tokens + t) * s.size);
      }
    }
  }
  return result;
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

void expect_near(const Values& found, const Values& expected, const std::string& what) {
  ASSERT_EQ(found.size(), expected.size()) << what;
  for (size_t i = 0; i < found.size(); ++i) {
    // float32 sums of up to 16 products on both sides.
    ASSERT_NEAR(found[i], expected[i], 2e-6 + 2e-6 * std::abs(expected[i])) << what << " at " << i;
  }
}

// The calls of a rank in a trace, in the words of the recording.
std::vector<std::string> calls_of(const CollectiveTrace& trace, int rank) {
  std::vector<std::string> list;
  for (const TraceEvent& e : trace.events()) {
    if (e.rank != rank) continue;
    const bool exchange = e.verb == Verb::kAllToAll;
    list.push_back((exchange ? "all_to_all_single" : name(e.verb)) + std::string(" ") +
                   std::to_string(e.count));
  }
  return list;
}

class RecordedUlysses : public testing::TestWithParam<const char*> {};

TEST_P(RecordedUlysses, IsOurs) {
  Sizes s;
  ASSERT_EQ(std::sscanf(GetParam(), "%d_%ld_%ld_%ld_%ld_%ld", &s.ranks, &s.batch, &s.length,
                        &s.heads, &s.kv_heads, &s.size),
            6);
  const std::string folder = kFolder + "ulysses_" + GetParam() + "/";
  Tensors full(folder + "full.pt");
  const int64_t each = s.batch * s.length * s.size;
  const Values q = full.get("q", each * s.heads), k = full.get("k", each * s.kv_heads),
               v = full.get("v", each * s.kv_heads), up = full.get("grad_out", each * s.heads);
  std::vector<Span> positions;
  for (int rank = 0; rank < s.ranks; ++rank) {
    positions.push_back(reference::even_share(s.length, s.ranks, rank));
  }
  sim::Cluster cluster({.sequence = s.ranks}, {.seed = 3});
  cluster.run([&](sim::Rank& rank) {
    const Span own = positions[static_cast<size_t>(rank.number())];
    reference::Ulysses ulysses(&rank.group(GroupKind::kSequence),
                               {s.heads, s.kv_heads, s.size, true, positions});
    std::vector<int64_t> places;
    for (int64_t b = 0; b < s.batch; ++b) {
      for (int64_t t = own.begin; t < own.end; ++t) places.push_back(t);
    }
    reference::UlyssesState state{.samples = s.batch};
    state.document_positions = ulysses.gather_positions(places, s.batch);
    const Values out = ulysses.forward(slice(q, s, s.heads, own), slice(k, s, s.kv_heads, own),
                                       slice(v, s, s.kv_heads, own), &state);
    const reference::UlyssesGradients back =
        ulysses.backward(rows(up, s, s.heads * s.size, own), state);
    Tensors real(folder + "rank" + std::to_string(rank.number()) + ".pt");
    const int64_t part = s.batch * own.size() * s.size;
    expect_near(out, real.get("out", part * s.heads), "out");
    expect_near(by_head(back.query, s, s.heads, own.size()), real.get("dq", part * s.heads), "dq");
    expect_near(by_head(back.key, s, s.kv_heads, own.size()), real.get("dk", part * s.kv_heads),
                "dk");
    expect_near(by_head(back.value, s, s.kv_heads, own.size()), real.get("dv", part * s.kv_heads),
                "dv");
  });
  for (int rank = 0; rank < s.ranks; ++rank) {
    Tensors real(folder + "rank" + std::to_string(rank) + ".pt");
    EXPECT_EQ(calls_of(cluster.trace(), rank), real.calls()) << "rank " << rank;
  }
}

INSTANTIATE_TEST_SUITE_P(All, RecordedUlysses,
                         testing::Values("2_1_8_4_4_8", "2_2_12_4_2_8", "4_1_8_4_1_8",
                                         "4_2_16_8_2_16"));

// ---- a step

// "all_reduce bfloat16 19616", as many ranks as there are.
using Calls = std::vector<std::string>;

Calls real_step(const std::string& name) {
  std::ifstream file(kFolder + "steps.json");
  Calls calls;
  const json steps = json::parse(file);
  for (const json& call : steps.at(name).at("calls")) {
    EXPECT_EQ(call[3], 2) << "a group of other ranks";
    std::string verb = call[0];
    if (verb == "all_gather_into_tensor") verb = "all_gather";
    if (verb == "reduce_scatter_tensor") verb = "reduce_scatter";
    if (verb == "all_to_all_single") verb = "all_to_all";
    calls.push_back(verb + " " + call[1].get<std::string>() + " " + call[2].dump());
  }
  return calls;
}

// Rank 0's calls of the second step of the same Llama with one micro batch.
Calls our_step(const Topology& topology, int stage) {
  reference::TrainConfig config;
  reference::ModelConfig& m = config.model;
  m.vocabulary = 64;
  m.hidden = 32;
  m.head_size = 8;
  m.intermediate = 48;
  m.dtype = DType::kBFloat16;
  config.data.sequence_length = 8;
  config.data.batch = topology.data;
  config.clip = 1.0;
  config.stage = stage;
  sim::Cluster cluster(topology, {.seed = 1});
  size_t begin = 0;
  cluster.run([&](sim::Rank& rank) {
    reference::Trainer trainer(config, properties::parallel_state(rank));
    trainer.initialise();
    trainer.step();
    rank.group(GroupKind::kWorld).barrier();
    if (rank.number() == 0) begin = cluster.trace().events().size();
    trainer.step();
  });
  Calls calls;
  for (size_t i = begin; i < cluster.trace().events().size(); ++i) {
    const TraceEvent& e = cluster.trace().events()[i];
    if (e.rank != 0 || e.verb == Verb::kBarrier) continue;
    calls.push_back(std::string(name(e.verb)) + " " + name(e.dtype) + " " +
                    std::to_string(e.count));
  }
  return calls;
}

// Takes `call` out of the list `times` times; it must be there so often at least.
void leave_out(Calls* calls, const std::string& call, int64_t times) {
  for (int64_t i = 0; i < times; ++i) {
    const auto found = std::find(calls->begin(), calls->end(), call);
    ASSERT_NE(found, calls->end()) << call << ", " << i << " of " << times;
    calls->erase(found);
  }
}

// Why ours are other calls:
//   gradients  DeepSpeed adds bf16 (Ulysses: fp32) in the order of the ring; ours go to their owner
//              as fp32 partial sums with a flag byte a node, to be added in the canonical order
//   norm       one float there; here the exact sum's 72 words, which know no order
//   loss       DeepSpeed leaves it on each rank; ours is the batch's, 72 words and a count
//   overflow   the same call; ours comes behind the norm
constexpr const char* kNorm = "all_reduce int64 72";
constexpr const char* kLoss = "all_reduce int64 73";

void leave_out_gradients(Calls* ours) {
  const auto flags = std::erase_if(*ours, [](const std::string& call) {
    return call.starts_with("all_to_all uint8 ");  // of the nodes
  });
  EXPECT_EQ(flags, 1u);
  const auto sums = std::find_if(ours->rbegin(), ours->rend(), [](const std::string& call) {
    return call.starts_with("all_to_all float32 ");
  });
  ASSERT_NE(sums, ours->rend());
  ours->erase(std::next(sums).base());
}

TEST(RecordedStep, OfStages1And2IsOursButForItsSums) {
  for (int stage = 1; stage <= 2; ++stage) {
    Calls real = real_step("stage" + std::to_string(stage)), ours = our_step({.data = 2}, stage);
    leave_out(&real, "all_reduce bfloat16 19616", 1);  // gradients
    leave_out(&real, "all_reduce float32 1", 1);       // norm
    leave_out_gradients(&ours);
    leave_out(&ours, kNorm, 1);
    leave_out(&ours, kLoss, 1);
    EXPECT_EQ(ours, real) << "stage " << stage;
    EXPECT_EQ(real, (Calls{"all_reduce uint8 1", "all_gather bfloat16 9808"}));
  }
}

// Stage 3: DeepSpeed keeps parameters of fewer than 100,000 elements on every rank and gathers
// them behind the step; ours gathers each where it is used, forward and again backward, and
// releases it. It also broadcasts the order in which parameters are used, to compare it.
TEST(RecordedStep, OfStage3GathersTheSameParameters) {
  Calls real = real_step("stage3"), ours = our_step({.data = 2}, 3);
  std::erase_if(real, [](const std::string& call) { return call.starts_with("broadcast int64"); });
  leave_out(&real, "reduce_scatter bfloat16 19616", 1);  // gradients
  leave_out(&real, "all_reduce float64 1", 1);           // norm
  leave_out_gradients(&ours);
  leave_out(&ours, kNorm, 1);
  leave_out(&ours, kLoss, 1);
  leave_out(&ours, "all_reduce uint8 1", 1);  // bf16 does not overflow; stage 3 does not ask
  for (const std::string& call : real) EXPECT_TRUE(call.starts_with("all_gather bfloat16")) << call;
  for (const std::string& call : real) leave_out(&ours, call, 1);  // forward
  // Backward again, but for the embedding, whose gradient does not ask for its values.
  leave_out(&real, "all_gather bfloat16 1024", 1);
  std::sort(real.begin(), real.end());
  std::sort(ours.begin(), ours.end());
  EXPECT_EQ(ours, real);
}

// Ulysses: the same exchanges in the same order with the same counts, layer by layer. Positions are
// gathered once a micro batch here, once a layer there; values travel as fp32 here.
TEST(RecordedStep, OfUlyssesExchangesTheSame) {
  Calls real = real_step("ulysses_stage1"), ours = our_step({.sequence = 2}, 1);
  const auto again = std::find(real.begin() + 1, real.end(), "all_gather int64 4");
  ASSERT_NE(again, real.end());
  real.erase(again);
  leave_out(&real, "all_reduce float32 19616", 1);  // gradients
  leave_out(&real, "all_reduce float32 1", 1);      // norm
  for (std::string& call : real) {
    if (call.starts_with("all_to_all bfloat16")) call.replace(11, 8, "float32");
  }
  leave_out_gradients(&ours);
  leave_out(&ours, kNorm, 1);
  leave_out(&ours, kLoss, 1);
  EXPECT_EQ(ours, real);
  EXPECT_EQ(std::count(real.begin(), real.end(), "all_to_all float32 64"), 8);
}

}  // namespace
}  // namespace isoshard
