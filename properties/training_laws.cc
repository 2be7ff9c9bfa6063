// Laws of whole training runs. See training_laws.h.
#include "properties/training_laws.h"

#include <bit>
#include <cmath>

#include "core/check.h"
#include "core/exact_sum.h"
#include "core/hex_float.h"
#include "properties/lifecycle.h"
#include "sim/topologies/catalog.h"

namespace isoshard::properties {
namespace {

using reference::StepReport;
using reference::TrainConfig;
using reference::Trainer;

// A run of a few steps on one drawn topology and stage.
SimulationCase draw_short(const Draw& draw, int world, int legs, int steps) {
  return draw_case(
      draw, {.topologies = sim::topologies_up_to(world), .steps = legs * steps, .every = steps});
}

bool same(double a, double b) { return std::bit_cast<uint64_t>(a) == std::bit_cast<uint64_t>(b); }

// A group of one, whose rank believes it is alone.
class LoneGroup : public Communicator {
 public:
  const std::string& group() const override { return name_; }
  int rank() const override { return 0; }
  int size() const override { return 1; }
  void all_reduce(Buffer, Reduction, CallSite) override {}
  void reduce_scatter(std::span<const ConstBuffer>, Buffer, Reduction, CallSite) override {
    stop();
  }
  void all_gather(ConstBuffer, std::span<const Buffer>, CallSite) override { stop(); }
  void all_to_all(std::span<const ConstBuffer>, std::span<const Buffer>, CallSite) override {
    stop();
  }
  void broadcast(Buffer, int, CallSite) override {}
  void send(ConstBuffer, int, CallSite) override { stop(); }
  void receive(Buffer, int, CallSite) override { stop(); }
  void barrier(CallSite) override {}

 private:
  static void stop() { CHECK(false, "a lone rank exchanges nothing"); }
  std::string name_ = "alone";
};

// The first sum, that of the loss, goes over all ranks; those of the norm over `few`.
class NormGroup : public LoneGroup {
 public:
  NormGroup(Communicator* all, Communicator* few) : all_(*all), few_(*few) {}
  int size() const override { return all_.size(); }
  void all_reduce(Buffer values, Reduction reduction, CallSite site) override {
    (calls_++ == 0 ? all_ : few_).all_reduce(values, reduction, site);
  }

 private:
  Communicator &all_, &few_;
  int calls_ = 0;
};

// What ranks report that add up no losses, averaged over them.
float mean_of_means(const SimulationCase& value) {
  const Leg& leg = value.legs[0];
  TrainConfig config = value.config;
  config.stage = leg.stage;
  double total = 0;
  sim::Cluster cluster(leg.topology, {.seed = value.seed});
  cluster.run([&](sim::Rank& rank) {
    LoneGroup alone;
    ParallelState parallel = parallel_state(rank);
    parallel.world = &alone;
    Trainer trainer(config, parallel);
    trainer.initialise();
    const double loss = static_cast<double>(trainer.step().loss);
    if (parallel.at.tensor == 0 && parallel.last_stage()) total += loss;  // those that have one
  });
  return static_cast<float>(total / leg.topology.zero_ranks());
}

}  // namespace

std::string name(TrainingMutant mutant) {
  constexpr const char* kNames[] = {
      "None",           "RankOrderSum",    "AbsentIsZero",  "NeighbourHeads", "LostToken",
      "UnsummedGroup",  "ShiftedPosition", "SampleTwice",   "ForgottenRank",  "MeanOfMeans",
      "FirstShardNorm", "StaleMoments",    "StaleCounter",  "DroppedTail",    "EvalMovesData",
      "EvalGathers",    "OtherSeed",       "QuietedNan",    "ReversedPeers",  "SmallGroup",
      "SummedMicros",   "FrozenShard",     "DegreeInFiles", "EarlyPointer",   "EqualLots",
      "NoLot",          "SkewedPlan"};
  return kNames[static_cast<size_t>(mutant)];
}

// The loss of a batch is one value for every (dp, sp, tp, ep, pp), also where ranks have no token
// with a loss, or none at all.
std::string loss_does_not_know_ranks(const Draw& draw, TrainingMutant mutant) {
  SimulationCase value = draw_short(draw, 8, 1, 1);
  value.config.data.masked = static_cast<int>(draw(0, 2));
  value.config.data.strided = false;
  value.config.model.dropout = 0;
  if (mutant == TrainingMutant::kMeanOfMeans) show_gradients(&value.config);  // nothing overflows
  Simulation simulation(value.config, value.seed);
  simulation.run(value.legs[0]);
  float loss = simulation.record().steps[0].loss;
  if (mutant == TrainingMutant::kMeanOfMeans) {
    loss = mean_of_means(value);
  }
  const float expected = single_rank(value.config, 1).steps[0].loss;
  if (same(loss, expected)) return "";
  return to_string(value.legs[0]) + ": loss " + hex_float(loss) + ", on one rank " +
         hex_float(expected);
}

// Stages 0, 1, 2 and 3 of one topology take the same steps.
std::string stages_are_one(const Draw& draw, TrainingMutant mutant) {
  const SimulationCase value = draw_short(draw, 6, 1, 2);
  const Record one = single_rank(value.config, 2);
  for (int stage = 0; stage <= 3; ++stage) {
    Hooks hooks;
    std::vector<float> before;
    if (mutant == TrainingMutant::kDroppedTail) {
      hooks.after_step = [](Trainer* trainer, int) {
        for (TrainedGroup& group : trainer->state().groups) {
          if (!group.pieces.empty() && group.pieces.back().count > 0) {
            const BufferPiece& last = group.pieces.back();
            group.states[0].second[static_cast<size_t>(last.at + last.count - 1)] = 0.0f;
          }
        }
      };
    }
    Simulation simulation(value.config, value.seed, hooks);
    simulation.run({value.legs[0].topology, stage, 2});
    const std::string reason = difference(one, simulation.record());
    if (!reason.empty()) {
      return to_string(Leg{value.legs[0].topology, stage}) + ": " + reason;
    }
  }
  return "";
}

// The norm is that of whole gradients, each element counted once: compared with the gradients
// themselves, which are the momentum of SGD after its first step.
std::string norms_count_each_element_once(const Draw& draw, TrainingMutant mutant) {
  SimulationCase value = draw_short(draw, 8, 1, 1);
  TrainConfig& config = value.config;
  show_gradients(&config);
  Hooks hooks;
  std::vector<std::unique_ptr<NormGroup>> groups;
  if (mutant == TrainingMutant::kFirstShardNorm) {  // tensor-parallel ranks do not add theirs up
    config.reduce = reference::ReduceMode::kTree;
    hooks.groups = [&](ParallelState* parallel, sim::Rank& rank) {
      groups.push_back(std::make_unique<NormGroup>(parallel->world, &rank.group(GroupKind::kZero)));
      parallel->world = groups.back().get();
    };
  }
  Simulation simulation(config, value.seed, hooks);
  simulation.run(value.legs[0]);
  ExactSum squares;
  for (const reference::ParameterInfo& info : parameters_of(config.model)) {
    if (!info.trains) continue;
    const auto& gradient = simulation.record().state.at({info.name, "momentum_buffer"});
    for (const float element : gradient) squares.add_square(element);
  }
  const double expected = std::sqrt(squares.value()), found = simulation.record().steps[0].norm;
  if (same(expected, found)) return "";
  return to_string(value.legs[0]) + ": norm " + hex_float(found) + ", of the gradients " +
         hex_float(expected);
}

// Step, save, reshard to a random topology and stage, load, step, …: the run on one rank.
std::string a_resumed_run_is_one_run(const Draw& draw, TrainingMutant mutant) {
  const SimulationCase value = draw_short(draw, 8, 4, 2);
  Hooks hooks;
  if (mutant == TrainingMutant::kStaleMoments) {
    hooks.after_load = [](Trainer* trainer, int) {
      for (TrainedGroup& group : trainer->state().groups) {
        std::vector<float>& last = group.states.back().second;
        std::fill(last.begin(), last.end(), 0.0f);
      }
    };
  }
  if (mutant == TrainingMutant::kStaleCounter) {
    hooks.after_load = [](Trainer* trainer, int) { trainer->state().counters.samples = 0; };
  }
  Simulation simulation(value.config, value.seed, hooks);
  for (const Leg& leg : value.legs) simulation.run(leg);
  return difference(single_rank(value.config, value.steps()), simulation.record());
}

// One seed, one run: the trace of all events is the same, and another order of events changes no
// value.
std::string the_seed_is_the_run(const Draw& draw, TrainingMutant mutant) {
  const SimulationCase value = draw_short(draw, 8, 2, 1);
  std::vector<Record> records;
  for (int again = 0; again < 2; ++again) {
    const bool other = again == 1 && mutant == TrainingMutant::kOtherSeed;
    Simulation simulation(value.config, value.seed + (other ? 1 : 0));
    for (const Leg& leg : value.legs) simulation.run(leg);
    records.push_back(simulation.record());
  }
  if (records[0].trace_hash != records[1].trace_hash) return "the same seed, and another trace";
  Simulation other(value.config, value.seed + 1);
  for (const Leg& leg : value.legs) other.run(leg);
  return difference(records[0], other.record());
}

// Evaluations between steps change no later step. With disable_in_eval each rank evaluates what it
// likes, as many samples and as long, nothing goes over any group, and each loss is one rank's of
// the same samples; without it all ranks together get the loss of one rank.
std::string evaluation_changes_nothing(const Draw& draw, TrainingMutant mutant) {
  SimulationCase value = draw_short(draw, 8, 1, 2);
  Topology t = value.legs[0].topology;
  t.tensor = t.pipeline = t.expert = 1;  // their exchanges are the model's own, also in evaluation
  value.config.model.experts = 0;
  value.config.disable_in_eval = draw(0, 1) == 1;
  value.config.stage = value.legs[0].stage < 3 ? value.legs[0].stage : 1;
  const bool bypass = value.config.disable_in_eval;
  const int64_t length = draw(2, 9);
  const Record expected = single_rank(value.config, 2);
  std::vector<Evaluation> evaluations;
  std::string reason;
  sim::Cluster cluster(t, {.seed = value.seed});
  cluster.run([&](sim::Rank& rank) {
    const int own = bypass ? rank.number() : 0;
    Trainer trainer(value.config, parallel_state(rank));
    trainer.initialise();
    Communicator& world = rank.group(GroupKind::kWorld);
    for (int step = 0; step < 2; ++step) {
      Evaluation e{step, 3 + own % 3, length + own % 4};
      const size_t before = cluster.trace().events().size();
      e.loss = trainer.evaluate(kEvaluated, e.count, e.length).loss;
      if (bypass && mutant == TrainingMutant::kEvalGathers) {
        std::vector<float> all(static_cast<size_t>(t.world()));
        std::vector<Buffer> targets;
        for (float& target : all) targets.push_back(buffer(std::span(&target, 1)));
        world.all_gather(const_buffer(std::span<const float>(&e.loss, 1)), targets);
      }
      if (bypass && before != cluster.trace().events().size()) {
        reason = "an evaluation in bypass has communicated";
      }
      evaluations.push_back(e);
      if (mutant == TrainingMutant::kEvalMovesData) ++trainer.state().counters.samples;
      world.barrier();
      const StepReport report = trainer.step();
      if (!same(report.loss, expected.steps[static_cast<size_t>(step)].loss)) {
        reason = "another loss behind evaluation";
      }
    }
  });
  if (reason.empty()) reason = difference_alone(value.config, evaluations);
  return reason.empty() ? "" : isoshard::to_string(t) + ": " + reason;
}

}  // namespace isoshard::properties
