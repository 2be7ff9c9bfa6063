// What lies beside the weights of a Hugging Face model: config.json, generation_config.json,
// tokenizer and processor files, and the model's own code where its config names it (auto_map).
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "checkpoint/blueprint.h"
#include "checkpoint/sharded_state.h"
#include "core/storage.h"

namespace isoshard::checkpoint {

// The folder that holds config.json: beside the tag folder (as a Trainer leaves it), or in it.
// Empty if there is none.
std::string folder_of_config(Storage& storage, const ShardedState& state);

// config.json of the folder; throws Error(kNotFound, kUsage).
nlohmann::json read_model_config(Storage& storage, const std::string& folder);

// Names of those files in the folder, sorted.
std::vector<std::string> side_files(Storage& storage, const std::string& folder,
                                    const nlohmann::json& config);

// Opens them; blueprints that copy them whole.
std::vector<FileBlueprint> copy_side_files(ShardedState* state, Storage& storage,
                                           const std::string& folder,
                                           const std::vector<std::string>& names);

}  // namespace isoshard::checkpoint
