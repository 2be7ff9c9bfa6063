// The files that one rank writes in a save, as DeepSpeed would name and fill them
// (deepspeed/runtime/engine.py, _save_checkpoint; zero/stage_1_and_2.py and stage3.py, state_dict),
// from that rank's buffers alone. Link 6 of the tensor's journey.
//
//   stage 0      mp_rank_XX_model_states.pt, with the optimizer; of the first rank that shares it
//   stages 1, 2  the same without the optimizer; each rank its zero_pp_rank_D_…_optim_states.pt
//   stage 3      each rank both: zero_pp_rank_D_mp_rank_XX_{model,optim}_states.pt
//
// A PipelineModule (engine/layer_files.h; stage 1) has a file a layer, and no module in the model
// file.
//
// AutoEP (engine/expert_files.h) adds a file an expert at stages 0 to 2, and at stage 0 an
// optimizer file an expert-parallel rank.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "checkpoint/blueprint.h"
#include "core/process_group.h"
#include "core/training_state.h"

namespace isoshard::engine {

using Json = nlohmann::ordered_json;

// What a save holds besides the rank's state.
struct SaveContent {
  Json config;                  // the DeepSpeed config, as the user gave it
  Json client_state;            // an object
  bool exclude_frozen = false;  // exclude_frozen_parameters of save_checkpoint
  std::string version = "0.19.8";
};

// A rank's place: its coordinate, and its number among those that share its optimizer state.
struct RankPlace {
  Topology topology;
  Coordinate at;
  int zero_rank() const { return at.data * topology.sequence + at.sequence; }
  int mp_rank() const { return at.pipeline * topology.tensor + at.tensor; }
  int mp_ranks() const { return topology.pipeline * topology.tensor; }
  int expert_data_ranks() const {
    return topology.zero_ranks() * topology.tensor / topology.expert;
  }
};

// Whether DeepSpeed has files for such a run and the engine writes them; otherwise why not.
struct Support {
  std::string why;  // "": they are there
  explicit operator bool() const { return why.empty(); }
};
Support supports(const TrainingState& state, const Topology& topology);

// Throws Error(kUnsupported) with that reason, and Error(kUsage) where client_state has a key that
// DeepSpeed reserves (KeyError there).
std::vector<checkpoint::FileBlueprint> rank_files(const TrainingState& state,
                                                  const RankPlace& place,
                                                  const SaveContent& content);

// Its two files; each knows the stage.
checkpoint::FileBlueprint model_file(const TrainingState& state, const RankPlace& place,
                                     const SaveContent& content);
checkpoint::FileBlueprint optim_file(const TrainingState& state, const RankPlace& place,
                                     const SaveContent& content);

}  // namespace isoshard::engine
