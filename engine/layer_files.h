// The files of a PipelineModule's layers (deepspeed/runtime/pipe/module.py, save_state_dict):
//
//   layer_NN-model_states.pt   the layer's tensors by their names in it; of the first data-parallel
//                              rank of the stage that has the layer
//
// A tied module is the embedding, and stands in the file of layer 0.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "checkpoint/blueprint.h"
#include "core/storage.h"
#include "engine/rank_files.h"

namespace isoshard::engine {

// A layer and its parameters.
struct LayerPlace {
  int layer = 0;
  std::vector<int> parameters;  // numbers in TrainingState::parameters
};
// The layers of the rank's stage that have a file.
std::vector<LayerPlace> layers_with_files(const TrainingState& state, const RankPlace& place);
// Where a parameter lies: the name of the file, and its name there.
std::pair<std::string, std::string> place_in_layers(const TrainedParameter& parameter);

checkpoint::FileBlueprint layer_file(const TrainingState& state, const LayerPlace& layer,
                                     bool exclude_frozen);

// Every parameter of the rank is there, with its shape: Error(kMismatch). Not strict: or it is not
// there at all; its file is.
void check_layers(Storage& storage, const std::string& folder, const TrainingState& state,
                  bool strict);

}  // namespace isoshard::engine
