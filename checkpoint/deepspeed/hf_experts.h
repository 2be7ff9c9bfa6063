// What a Hugging Face model's files name otherwise than DeepSpeed's: AutoEP's stacked experts under
// the names that a Hugging Face model's files have: one tensor an expert and matrix, as AutoEP
// found them before it stacked them (module_inject/auto_ep_presets).
#pragma once

#include <string>
#include <vector>

#include "checkpoint/sharded_state.h"

namespace isoshard::checkpoint {

// Replaces every stack by its experts and renames the routers; their second names go. `model_type`
// is that of config.json. Returns "new name: old name[expert]" for each, and throws
// Error(kUnsupported) for a model type whose names are not known.
std::vector<std::string> name_experts_for_hf(ShardedState* state, const std::string& model_type);

// Tied names become parameters of their own, with the bytes of their target.
void untie(ShardedState* state, const std::vector<std::string>& names);

}  // namespace isoshard::checkpoint
