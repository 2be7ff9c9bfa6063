// A bf16 pipeline of stage 0: BF16_Optimizer's files beside model files without param_shapes
// (deepspeed/runtime/engine.py saves them with ZeRO alone). Names and order are those of
// param_slice_mappings, shapes those of the layer files.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "checkpoint/deepspeed/model_states.h"

namespace isoshard::checkpoint {

// By layer and name in it, of one tensor-parallel rank.
using LayerShapes = std::map<int, std::map<std::string, Shape>>;

LayerShapes read_layer_shapes(const ShardedState& state, const std::vector<int>& files);

// Of one mp rank, whose optimizer files are open. Throws Error(kMismatch, kIncomplete,
// kUnsupported) where the layers do not have what the slices say.
std::vector<NamedShapes> shapes_of_slices(const ShardedState& part, const LayerShapes& layers);

// The model file of such an mp rank holds partition rank 0's optimizer once more: replicas.
void add_model_optimizer(ShardedState* part, const ModelStates& model);

}  // namespace isoshard::checkpoint
