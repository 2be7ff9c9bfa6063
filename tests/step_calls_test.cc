// The calls of a training step of ZeRO 1, 2, 3 and Ulysses beside those of real ranks
// (traces/exchanges/steps.json, recorded by scripts/record_traces.py exchanges): operation, dtype,
// elements and ranks of the group, in order. Every difference has its reason and its number here.
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>

#include "properties/file_bridge.h"
#include "reference/trainer.h"
#include "sim/cluster.h"

namespace isoshard {
namespace {

using nlohmann::json;

json recorded_steps() {
  std::ifstream file(std::string(ISOSHARD_TRACES) + "/exchanges/steps.json");
  return json::parse(file);
}

// "all_reduce bfloat16 19616 of 0,1".
using Calls = std::vector<std::string>;

// By rank; `which`: "calls" (the second step) or "third".
std::vector<Calls> real_step(const std::string& name, const std::string& which = "calls") {
  std::vector<Calls> ranks;
  const json steps = recorded_steps();
  for (const json& rank : steps.at(name).at(which)) {
    ranks.emplace_back();
    for (const json& call : rank) {
      std::string verb = call[0], members;
      if (verb == "all_gather_into_tensor") verb = "all_gather";
      if (verb == "reduce_scatter_tensor") verb = "reduce_scatter";
      if (verb == "all_to_all_single") verb = "all_to_all";
      for (const int member : call[3]) {
        members += (members.empty() ? "" : ",") + std::to_string(member);
      }
      ranks.back().push_back(verb + " " + call[1].get<std::string>() + " " + call[2].dump() +
                             " of " + members);
    }
  }
  return ranks;
}

// By rank, the calls of the second step of the same Llama with one micro batch.
std::vector<Calls> our_step(const Topology& topology, int stage) {
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
  std::map<int, size_t> begin;
  cluster.run([&](sim::Rank& rank) {
    reference::Trainer trainer(config, properties::parallel_state(rank));
    trainer.initialise();
    trainer.step();
    begin[rank.number()] = cluster.trace().events().size();
    trainer.step();
  });
  std::vector<Calls> calls(begin.size());
  for (size_t i = 0; i < cluster.trace().events().size(); ++i) {
    const TraceEvent& e = cluster.trace().events()[i];
    if (i < begin[e.rank]) continue;
    const std::string& group = cluster.trace().groups()[static_cast<size_t>(e.group)];
    calls[static_cast<size_t>(e.rank)].push_back(std::string(name(e.verb)) + " " + name(e.dtype) +
                                                 " " + std::to_string(e.count) + " of " +
                                                 group.substr(group.find(' ') + 1));
  }
  return calls;
}

// A call that there are other numbers of. The first of them, as many as both sides have, keep their
// places; one more or less than said here, on either side, fails.
struct Difference {
  const char* call;
  int64_t theirs, ours;
  const char* why;
};

void settle(Calls* calls, const std::string& call, int64_t expected, int64_t kept,
            const std::string& who, const char* why) {
  int64_t seen = 0;
  std::erase_if(*calls, [&](const std::string& c) { return c == call && ++seen > kept; });
  EXPECT_EQ(seen, expected) << who << " " << call << " (" << why << ")";
}

// `members`: the group of what differs.
void settle_all(Calls* real, Calls* ours, const std::string& members,
                const std::vector<Difference>& differences) {
  for (const Difference& d : differences) {
    const std::string call = std::string(d.call) + " of " + members;
    const int64_t kept = std::min(d.theirs, d.ours);
    settle(real, call, d.theirs, kept, "DeepSpeed's", d.why);
    settle(ours, call, d.ours, kept, "our", d.why);
  }
}

// What differs in every step:
constexpr const char* kGradients =
    "there the gradients' sum in the model's dtype, in the ring's order; here fp32 partial sums to "
    "their owners, to be added in the canonical order, and a flag byte for each row of each";
constexpr const char* kNorm =
    "there one float; here the exact sum's 72 words, which know no order, before the overflow flag";
constexpr const char* kLoss =
    "there it stays on each rank; here it is the batch's, an exact sum's 72 words and a count";
constexpr const char* kOverflow = "stage 3 with bf16 does not ask there";
constexpr const char* kTrace =
    "the order in which parameters are used, compared once it is complete: lengths and lists";

TEST(RecordedStep, OfStages1And2IsOursButForItsSums) {
  for (int stage = 1; stage <= 2; ++stage) {
    std::vector<Calls> real = real_step("stage" + std::to_string(stage)),
                       ours = our_step({.data = 2}, stage);
    ASSERT_EQ(real.size(), 2u);
    for (size_t rank = 0; rank < 2; ++rank) {
      settle_all(&real[rank], &ours[rank], "0,1",
                 {{"all_reduce bfloat16 19616", 1, 0, kGradients},
                  {"all_to_all float32 19616", 0, 1, kGradients},
                  {"all_to_all uint8 85", 0, 1, kGradients},
                  {"all_reduce float32 1", 1, 0, kNorm},
                  {"all_reduce int64 72", 0, 1, kNorm},
                  {"all_reduce int64 73", 0, 1, kLoss}});
      EXPECT_EQ(ours[rank], real[rank]) << "stage " << stage << " rank " << rank;
      EXPECT_EQ(real[rank],
                (Calls{"all_reduce uint8 1 of 0,1", "all_gather bfloat16 9808 of 0,1"}));
    }
  }
}

// Stage 3 calls these, besides the gathers of parameters, where ours calls others.
std::vector<Difference> stage_3_differences() {
  return {{"reduce_scatter bfloat16 19616", 1, 0, kGradients},
          {"all_to_all float32 19616", 0, 1, kGradients},
          {"all_to_all uint8 104", 0, 1, kGradients},
          {"all_reduce float64 1", 1, 0, kNorm},
          {"all_reduce int64 72", 0, 1, kNorm},
          {"all_reduce int64 73", 0, 1, kLoss},
          {"all_reduce uint8 1", 0, 1, kOverflow},
          {"broadcast int64 1", 3, 0, kTrace},
          {"broadcast int64 63", 1, 0, kTrace},
          {"broadcast int64 42", 2, 0, kTrace}};
}

// In the backward pass the projections of one layer are used in another order: v, k, q there, which
// is autograd's; q, k, v here. Each call is a gather of a layer's o and what follows. Returns how
// many layers that was.
int reverse_projections(Calls* ours) {
  const std::string large = "all_gather bfloat16 512 of 0,1",
                    small = "all_gather bfloat16 256 of 0,1";
  const Calls pattern{large, large, small, small};
  int layers = 0;
  auto at = ours->begin();
  while ((at = std::search(at, ours->end(), pattern.begin(), pattern.end())) != ours->end()) {
    std::reverse(at + 1, at + 4);
    at += 4;
    ++layers;
  }
  return layers;
}

// With stage3_param_persistence_threshold 0 and nothing gathered in advance or kept, DeepSpeed
// gathers each parameter where it is used, as ours does: the same gathers in the same order.
TEST(RecordedStep, OfStage3GathersWhereDeepSpeedDoes) {
  std::vector<Calls> real = real_step("stage3_where_used"), ours = our_step({.data = 2}, 3);
  ASSERT_EQ(real.size(), 2u);
  std::vector<Difference> differences = stage_3_differences();
  differences.push_back({"all_gather bfloat16 1024", 4, 3,
                         "the embedding again, last in the backward pass, though its gradient does "
                         "not ask for its values"});
  for (size_t rank = 0; rank < 2; ++rank) {
    settle_all(&real[rank], &ours[rank], "0,1", differences);
    EXPECT_EQ(reverse_projections(&ours[rank]), 2);
    EXPECT_EQ(ours[rank], real[rank]) << "rank " << rank;
    EXPECT_EQ(real[rank].size(), 41u);
  }
}

// As it is configured by default, DeepSpeed keeps parameters of up to 100,000 elements on every
// rank, and gathers them once, behind the step, in the module's order. Ours has no such threshold,
// so that this order cannot be compared; the gathers are those of the forward pass.
TEST(RecordedStep, OfStage3GathersTheSameParameters) {
  constexpr const char* kAgain = "ours once more in the backward pass, but for the embedding";
  std::vector<Calls> real = real_step("stage3"), ours = our_step({.data = 2}, 3);
  ASSERT_EQ(real.size(), 2u);
  Calls module_order;
  const auto recorded = recorded_steps();
  for (const int64_t size : recorded.at("stage3").at("parameters")) {
    module_order.push_back("all_gather bfloat16 " + std::to_string(size / 2) + " of 0,1");
  }
  std::vector<Difference> differences = stage_3_differences();
  const std::vector<Difference> again = {{"all_gather bfloat16 1024", 2, 3, kAgain},
                                         {"all_gather bfloat16 768", 6, 12, kAgain},
                                         {"all_gather bfloat16 512", 4, 8, kAgain},
                                         {"all_gather bfloat16 256", 4, 8, kAgain},
                                         {"all_gather bfloat16 16", 5, 10, kAgain}};
  differences.insert(differences.end(), again.begin(), again.end());
  for (size_t rank = 0; rank < 2; ++rank) {
    settle_all(&real[rank], &ours[rank], "0,1", differences);
    EXPECT_EQ(real[rank], module_order) << "rank " << rank;
    std::sort(real[rank].begin(), real[rank].end());
    std::sort(ours[rank].begin(), ours[rank].end());
    EXPECT_EQ(ours[rank], real[rank]) << "rank " << rank;
  }
}

// The order of use is compared once, when it is known; the next step has the other calls alone.
TEST(RecordedStep, OfLaterStepsIsTheSameButForTheTrace) {
  for (const char* name : {"stage1", "stage2", "stage3", "stage3_where_used", "ulysses_stage1"}) {
    std::vector<Calls> second = real_step(name);
    const std::vector<Calls> third = real_step(name, "third");
    size_t traces = 0;
    for (Calls& calls : second) {
      traces += std::erase_if(
          calls, [](const std::string& call) { return call.starts_with("broadcast int64 "); });
    }
    EXPECT_EQ(second, third) << name;
    EXPECT_EQ(traces, std::string(name).starts_with("stage3") ? 12u : 0u) << name;
  }
}

// What was given another dtype there takes ours, in its place; so often, no more and no less.
void rename(Calls* calls, const std::string& found, const std::string& expected, int64_t times) {
  EXPECT_EQ(std::count(calls->begin(), calls->end(), found), times) << found;
  std::replace(calls->begin(), calls->end(), found, expected);
}

// Ulysses with two ranks a sequence and two sequences: the same exchanges in the same order with
// the same counts among the same ranks, layer by layer. Values travel as bf16 there, and as fp32
// here, where activations are fp32.
TEST(RecordedStep, OfUlyssesExchangesTheSame) {
  std::vector<Calls> real = real_step("ulysses_stage1"),
                     ours = our_step({.data = 2, .sequence = 2}, 1);
  ASSERT_EQ(real.size(), 4u);
  for (size_t rank = 0; rank < 4; ++rank) {
    const std::string sequence = rank < 2 ? "0,1" : "2,3";
    // The last slice of a sample is more nodes of the sum over tokens than the first.
    const int64_t nodes = rank % 2 == 0 ? 1 : 22;
    const std::string sums = "all_to_all float32 " + std::to_string(nodes * 19616),
                      flags = "all_to_all uint8 " + std::to_string(nodes * 87);
    settle_all(&real[rank], &ours[rank], "0,1,2,3",
               {{"all_reduce float32 19616", 1, 0, kGradients},
                {sums.c_str(), 0, 1, kGradients},
                {flags.c_str(), 0, 1, kGradients},
                {"all_reduce float32 1", 1, 0, kNorm},
                {"all_reduce int64 72", 0, 1, kNorm},
                {"all_reduce int64 73", 0, 1, kLoss}});
    settle_all(
        &real[rank], &ours[rank], sequence,
        {{"all_gather int64 4", 2, 1, "positions: once a layer there, once a micro batch here"}});
    for (const std::string count : {"128", "64"}) {
      rename(&real[rank], "all_to_all bfloat16 " + count + " of " + sequence,
             "all_to_all float32 " + count + " of " + sequence, 8);
    }
    EXPECT_EQ(ours[rank], real[rank]) << "rank " << rank;
    EXPECT_EQ(real[rank].size(), 19u);
  }
}

}  // namespace
}  // namespace isoshard
