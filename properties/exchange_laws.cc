// Laws of exchanges, groups and splits. See training_laws.h.
#include <algorithm>
#include <bit>

#include "core/error.h"
#include "core/random.h"
#include "properties/lifecycle.h"
#include "properties/training_laws.h"
#include "sim/topologies/catalog.h"

namespace isoshard::properties {
namespace {

using reference::TrainConfig;
using reference::Trainer;

// Of a run of one rank: any bits, among them signalling NaNs, −0 and denormals.
float any_bits(uint64_t seed, uint64_t rank, uint64_t peer, uint64_t at) {
  const uint64_t word = keyed_random(seed, {rank, peer, at});
  const uint32_t bits = static_cast<uint32_t>(word);
  switch (word >> 61) {
    case 0:
      return std::bit_cast<float>(0x7f800001u | (bits & 0x803fffffu));  // signalling NaN
    case 1:
      return std::bit_cast<float>(0x80000000u);
    case 2:
      return std::bit_cast<float>(bits & 0x807fffffu);  // denormal
    default:
      return std::bit_cast<float>(bits);
  }
}

SimulationCase short_case(const Draw& draw, const std::vector<Topology>& topologies, int steps) {
  return draw_case(draw, {.topologies = topologies, .steps = steps, .every = steps});
}

}  // namespace

// all_to_all and its inverse give back every bit, whatever the counts.
std::string an_exchange_has_an_inverse(const Draw& draw, TrainingMutant mutant) {
  const int ranks = static_cast<int>(draw(1, 9));
  const uint64_t seed = static_cast<uint64_t>(draw(1, 1'000'000));
  const int64_t most = draw(0, 7);
  const auto count = [&](int from, int to) {  // of elements that `from` has for `to`
    return static_cast<int64_t>(
        keyed_random(seed, {static_cast<uint64_t>(from), static_cast<uint64_t>(to)}) %
        static_cast<uint64_t>(most + 1));
  };
  std::string reason;
  sim::Cluster cluster({.data = ranks}, {.seed = seed});
  cluster.run([&](sim::Rank& rank) {
    Communicator& world = rank.group(GroupKind::kWorld);
    const int own = rank.number();
    std::vector<std::vector<float>> sent;
    std::vector<int64_t> coming, going;
    for (int peer = 0; peer < ranks; ++peer) {
      coming.push_back(count(peer, own));
      going.push_back(count(own, peer));
      sent.emplace_back();
      for (int64_t i = 0; i < going.back(); ++i) {
        sent.back().push_back(any_bits(seed, static_cast<uint64_t>(own),
                                       static_cast<uint64_t>(peer), static_cast<uint64_t>(i)));
      }
    }
    std::vector<std::vector<float>> there = exchange(world, sent, coming);
    if (mutant == TrainingMutant::kQuietedNan) {
      for (auto& part : there) {
        for (float& value : part) value += 0.0f;  // −0 becomes +0, a signalling NaN a quiet one
      }
    }
    std::vector<std::vector<float>> back = exchange(world, there, going);
    if (mutant == TrainingMutant::kReversedPeers) std::reverse(back.begin(), back.end());
    for (size_t peer = 0; peer < sent.size(); ++peer) {
      if (back[peer].size() != sent[peer].size()) reason = "another number of elements comes back";
      for (size_t i = 0; i < std::min(back[peer].size(), sent[peer].size()); ++i) {
        if (std::bit_cast<uint32_t>(back[peer][i]) == std::bit_cast<uint32_t>(sent[peer][i]))
          continue;
        reason = "rank " + std::to_string(own) + " gets other bits back from rank " +
                 std::to_string(peer);
      }
    }
  });
  return reason;
}

// The gradient of every parameter, which is SGD's first momentum, is one rank's: so it is reduced
// over the ranks that have a part in it, over all of them, once.
std::string gradients_are_of_all_their_ranks(const Draw& draw, TrainingMutant mutant) {
  SimulationCase value = short_case(draw, sim::topologies_up_to(8), 1);
  TrainConfig& config = value.config;
  show_gradients(&config);
  config.stage = value.legs[0].stage;
  const Topology& t = value.legs[0].topology;
  std::vector<TrainingState> states(static_cast<size_t>(t.world()));
  sim::Cluster cluster(t, {.seed = value.seed});
  cluster.run([&](sim::Rank& rank) {
    ParallelState parallel = parallel_state(rank);
    if (mutant == TrainingMutant::kSmallGroup) parallel.zero = &rank.group(GroupKind::kData);
    Trainer trainer(config, parallel);
    trainer.initialise();
    trainer.step();
    states[static_cast<size_t>(rank.number())] = trainer.state();
  });
  const std::string reason =
      reference::difference(single_rank(config, 1).state, reference::whole_state_of(states));
  return reason.empty() ? "" : to_string(value.legs[0]) + ": " + reason;
}

// How a batch is cut into micro batches changes no bit: the recipe averages over the batch's
// tokens, on one rank and on many.
std::string micro_batches_are_nothing(const Draw& draw, TrainingMutant mutant) {
  SimulationCase value = short_case(draw, sim::topologies_up_to(6), 2);
  value.config.model.dropout = 0;
  // AdamW does not know the size of a gradient; the mutant must be seen for what it is.
  if (mutant == TrainingMutant::kSummedMicros) {
    value.config.optimizer.kind = reference::OptimizerKind::kSgd;
  }
  const Record one = single_rank(value.config, 2);
  const int64_t before = value.config.data.micro_batch;
  value.config.data.micro_batch = draw(1, 6);
  if (mutant == TrainingMutant::kSummedMicros) {
    const auto micros = [&](int64_t size) { return (value.config.data.batch + size - 1) / size; };
    const double ratio = static_cast<double>(micros(value.config.data.micro_batch)) /
                         static_cast<double>(micros(before));
    value.config.schedule.max_lr *= ratio;
  }
  Simulation simulation(value.config, value.seed);
  simulation.run(value.legs[0]);
  const std::string reason = difference(one, simulation.record());
  return reason.empty() ? ""
                        : to_string(value.legs[0]) + ", micro batches of " +
                              std::to_string(value.config.data.micro_batch) + ": " + reason;
}

// One axis alone, tensor, expert or pipeline: the split model is the whole one.
std::string splits_are_the_unsplit(const Draw& draw, TrainingMutant mutant) {
  const int ranks = static_cast<int>(draw(2, 4));
  Topology t;
  switch (draw(0, 2)) {
    case 0:
      t.tensor = ranks;
      break;
    case 1:
      t.data = t.expert = ranks;
      break;
    default:
      t.pipeline = ranks;
  }
  const SimulationCase value = short_case(draw, {t}, 2);
  Hooks hooks;
  std::vector<TrainedGroup> before;
  if (mutant == TrainingMutant::kFrozenShard) {
    hooks.after_step = [&](Trainer* trainer, int rank) {
      if (rank != t.world() - 1) return;
      if (!before.empty()) trainer->state().groups = before;  // the second step has not been
      before = trainer->state().groups;
    };
  }
  Simulation simulation(value.config, value.seed, hooks);
  simulation.run(value.legs[0]);
  const std::string reason = difference(single_rank(value.config, 2), simulation.record());
  return reason.empty() ? "" : to_string(value.legs[0]) + ": " + reason;
}

// Without the bypass an evaluation is everybody's: where ranks of a sequence-parallel group are
// given different lots, of more or longer samples or both, it is told, and nothing waits for ever
// or goes on. Not so where more and shorter samples come to as many tokens on each rank: a
// collective compares counts.
std::string uneven_evaluation_is_told(const Draw& draw, TrainingMutant mutant) {
  const Topology t{.data = static_cast<int>(draw(1, 2)), .sequence = static_cast<int>(draw(2, 4))};
  SimulationCase value = short_case(draw, {t}, 1);
  value.config.disable_in_eval = false;
  value.config.model.experts = 0;
  value.config.stage = static_cast<int>(draw(0, 2));
  const int64_t samples = t.data * draw(1, 3), length = draw(2, 9);
  const int64_t uneven = draw(1, 3), much = draw(1, 3);  // 1: more of them, 2: longer, 3: both
  sim::Cluster cluster(t, {.seed = value.seed});
  try {
    cluster.run([&](sim::Rank& rank) {
      Trainer trainer(value.config, parallel_state(rank));
      trainer.initialise();
      const bool other = rank.number() == 1 && mutant != TrainingMutant::kEqualLots;
      if (other && mutant == TrainingMutant::kNoLot) return;
      trainer.evaluate(kEvaluated, samples + (other && uneven != 2 ? t.data * much : 0),
                       length + (other && uneven != 1 ? much : 0));
    });
  } catch (const Error& error) {
    // At the call of a rank, not where none could go on.
    const bool at_call = error.info().what.starts_with("On rank ");
    return at_call && error.info().code == ErrorCode::kMismatch ? "" : error.what();
  }
  return "an evaluation of different lots has ended as if nothing were wrong";
}

}  // namespace isoshard::properties
