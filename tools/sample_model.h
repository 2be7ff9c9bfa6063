// The models that golden and trace know by name.
#pragma once

#include <string>

#include "reference/trainer.h"

namespace isoshard::tools {

constexpr const char* kSampleModels = "llama, llama-fp32, mixtral or tiny";

// "llama" and "mixtral" have the sizes of the recorded checkpoints. Throws Error(kUsage).
reference::TrainConfig sample_model(const std::string& name, uint64_t seed);

}  // namespace isoshard::tools
