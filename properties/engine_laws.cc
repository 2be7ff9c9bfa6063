// Laws of the files that ranks save. See training_laws.h.
#include <map>

#include "checkpoint/small_file.h"
#include "core/error.h"
#include "properties/training_laws.h"

namespace isoshard::properties {
namespace {

using engine::CheckpointEngine;
using engine::Json;
using reference::TrainConfig;
using reference::Trainer;

// The dense model of a drawn case, which the engine has files for at any stage.
TrainConfig dense_config(const Draw& draw) {
  TrainConfig config = draw_config(draw);
  config.model.experts = 0;
  config.pipeline_module = false;
  if (config.model.dtype == DType::kFloat16) {
    config.model.dtype = DType::kBFloat16;
    config.loss_scale = {};
  }
  config.stage = static_cast<int>(draw(0, 3));
  return config;
}

std::map<std::string, std::string> saved_files(const TrainConfig& config, const Topology& topology,
                                               const Json& json, uint64_t seed) {
  checkpoint::MemoryStorage storage;
  sim::Cluster cluster(topology, {.seed = seed});
  cluster.run([&](sim::Rank& rank) {
    const ParallelState parallel = parallel_state(rank);
    Trainer trainer(config, parallel);
    trainer.initialise();
    trainer.step();
    CheckpointEngine(storage, parallel, json, [](const std::string&) {
    }).save_checkpoint(trainer.state(), "/run", {.tag = "tag"});
  });
  std::map<std::string, std::string> files;
  for (const DirectoryEntry& entry : storage.list("/run/tag")) {
    files[entry.name] = read_small_file(storage, "/run/tag/" + entry.name, 1 << 24);
  }
  return files;
}

}  // namespace

// dp ranks of sp sequence-parallel ones write the very files of dp·sp data-parallel ranks.
std::string files_do_not_know_sequences(const Draw& draw, TrainingMutant mutant) {
  const TrainConfig config = dense_config(draw);
  const uint64_t seed = static_cast<uint64_t>(draw(1, 1'000'000));
  const Topology t{.data = static_cast<int>(draw(1, 3)), .sequence = static_cast<int>(draw(1, 4))};
  const Json plain = deepspeed_config(config, {}, config.stage);
  Json json = plain;
  if (mutant == TrainingMutant::kDegreeInFiles) json["sequence_parallel_size"] = t.sequence;
  const auto expected = saved_files(config, {.data = t.zero_ranks()}, plain, seed);
  const auto found = saved_files(config, t, t.sequence > 1 ? json : plain, seed + 1);
  if (expected.size() != found.size()) return "another number of files";
  for (const auto& [name, bytes] : expected) {
    if (!found.contains(name)) return name + " is not written";
    if (found.at(name) != bytes) {
      return name + " of " + to_string(t) + " differs from that of dp" +
             std::to_string(t.zero_ranks());
    }
  }
  return "";
}

// A rank that dies at any point of a save leaves the checkpoint before it or the new one, and what
// `latest` names can be loaded.
std::string a_death_leaves_old_or_new(const Draw& draw, TrainingMutant mutant) {
  const TrainConfig config = dense_config(draw);
  const Topology t{.data = static_cast<int>(draw(1, 3)), .tensor = static_cast<int>(draw(1, 2))};
  const sim::FaultKind kinds[] = {sim::FaultKind::kDieBefore, sim::FaultKind::kDieInside,
                                  sim::FaultKind::kDieAfter};
  sim::Fault fault{.kind = kinds[draw(0, 2)], .rank = static_cast<int>(draw(0, t.world() - 1))};
  const int64_t place = draw(0, 1'000'000);
  const Json json = deepspeed_config(config, t, config.stage);
  checkpoint::MemoryStorage scratch, storage;
  const size_t world = static_cast<size_t>(t.world());
  std::vector<TrainingState> old_states(world), new_states(world), found(world);
  const auto engine_of = [&](sim::Rank& rank, const ParallelState& parallel, Storage& disk) {
    return CheckpointEngine(rank.storage(disk), parallel, json, [](const std::string&) {});
  };
  int64_t begin = 0, end = 0;  // operations of that rank's second save
  const auto steps = [&](sim::Rank& rank, bool second) {
    const size_t number = static_cast<size_t>(rank.number());
    const ParallelState parallel = parallel_state(rank);
    Trainer trainer(config, parallel);
    CheckpointEngine files = engine_of(rank, parallel, second ? storage : scratch);
    trainer.initialise();
    trainer.step();
    files.save_checkpoint(trainer.state(), "/run", {});
    old_states[number] = trainer.state();
    trainer.step();
    new_states[number] = trainer.state();
    if (!second && rank.number() == fault.rank) begin = rank.operations();
    if (second && mutant == TrainingMutant::kEarlyPointer && rank.number() == 0) {
      checkpoint::replace_small_file(storage, "/run/latest", "global_step2");
    }
    files.save_checkpoint(trainer.state(), "/run", {});
    if (!second && rank.number() == fault.rank) end = rank.operations();
  };
  sim::Cluster first(t, {.seed = 1});
  first.run([&](sim::Rank& rank) { steps(rank, false); });
  fault.operation = begin + place % (end - begin);  // the same seed, the same operations
  sim::Cluster second(t, {.seed = 1, .faults = {fault}});
  try {
    second.run([&](sim::Rank& rank) { steps(rank, true); });
  } catch (const Error& error) {
    if (error.info().code != ErrorCode::kInterrupted) return error.what();
  }
  if (second.dead().empty()) return "the rank has not died in its save";
  sim::Cluster third(t, {.seed = 2});
  third.run([&](sim::Rank& rank) {
    const ParallelState parallel = parallel_state(rank);
    Trainer trainer(config, parallel);
    engine_of(rank, parallel, storage).load_checkpoint(&trainer.state(), "/run", {});
    found[static_cast<size_t>(rank.number())] = trainer.state();
  });
  const reference::WholeState after = reference::whole_state_of(found);
  const std::string other = reference::difference(reference::whole_state_of(old_states), after);
  if (other.empty() || reference::difference(reference::whole_state_of(new_states), after).empty())
    return "";
  return "neither the old nor the new state: " + other;
}

}  // namespace isoshard::properties
