// Values of a save as pickle nodes.
#pragma once

#include <nlohmann/json.hpp>
#include <span>
#include <string>

#include "checkpoint/torch_builder.h"
#include "core/training_state.h"

namespace isoshard::engine {

// Objects become dicts, in their order; numbers keep whether they are whole.
checkpoint::NodeId json_node(checkpoint::TorchBuilder* builder, const nlohmann::ordered_json& json);
checkpoint::NodeId setting_node(checkpoint::TorchBuilder* builder, const Setting& setting);

// A storage of those values in a dtype of parameters; its number.
int value_storage(checkpoint::TorchBuilder* builder, std::span<const float> values, DType dtype);

// universal_checkpoint_info of an AutoTP run (deepspeed/module_inject/layers.py, 0.19.8).
std::vector<std::pair<std::string, checkpoint::NodeId>> split_info(
    checkpoint::TorchBuilder* builder, const TrainingState& state, int ranks);

}  // namespace isoshard::engine
