// Two ranks, one disk in memory and an engine each: the stage of the engine's tests.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "checkpoint/memory_storage.h"
#include "core/cast.h"
#include "core/error.h"
#include "engine/checkpoint.h"
#include "properties/simulation.h"

namespace isoshard {

using checkpoint::MemoryStorage;
using engine::CheckpointEngine;
using engine::Json;
using engine::LoadOptions;
using engine::LoadResult;
using reference::TrainConfig;
using reference::Trainer;

inline TrainConfig small(int stage) {
  TrainConfig config;
  config.model.layers = 1;
  config.model.hidden = 4;
  config.model.intermediate = 3;
  config.data.batch = 2;
  config.data.sequence_length = 4;
  config.stage = stage;
  return config;
}

struct World {
  MemoryStorage disk;
  TrainConfig config = small(1);
  Topology topology{.data = 2};
  Json client_state = Json::object();
  Json more_config = Json::object();
  std::vector<std::string> warnings;

  using Body = std::function<void(sim::Rank&, Trainer&, CheckpointEngine&)>;

  // What is thrown, as text; "" if nothing.
  Error run(const Body& body, sim::Faults faults = {}) {
    sim::Cluster cluster(topology, {.seed = 5, .faults = std::move(faults)});
    try {
      cluster.run([&](sim::Rank& rank) {
        const ParallelState parallel = properties::parallel_state(rank);
        Trainer trainer(config, parallel);
        trainer.initialise();
        Json json = properties::deepspeed_config(config, topology, config.stage);
        json.update(more_config);
        CheckpointEngine files(rank.storage(disk), parallel, json,
                               [&](const std::string& text) { warnings.push_back(text); });
        body(rank, trainer, files);
      });
    } catch (const Error& error) {
      return error;
    }
    return Error(ErrorInfo{});
  }

  std::string latest() {
    return disk.is_file("/run/latest") ? read_small_file(disk, "/run/latest", 99) : "";
  }
};

inline void save(Trainer& trainer, CheckpointEngine& files, const std::string& tag = "") {
  files.save_checkpoint(trainer.state(), "/run", {.tag = tag});
}

}  // namespace isoshard
