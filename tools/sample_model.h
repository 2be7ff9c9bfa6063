// The models that golden and trace know by name.
#pragma once

#include <string>
#include <vector>

#include "reference/trainer.h"

namespace isoshard::tools {

constexpr const char* kSampleModels =
    "llama, llama-fp32, llama-tied, llama-frozen, mixtral or tiny";

// "llama" and "mixtral" have the sizes of the recorded checkpoints. Throws Error(kUsage).
reference::TrainConfig sample_model(const std::string& name, uint64_t seed);

// A run of such a model as a topology text ("dp=2,stage=1") and, unless it is empty, a DeepSpeed
// config say: what the config says of tp, sp, ep, stage, dtype, optimizer, schedule, clipping and
// batch counts where the text does not; Error(kUsage) where both say something else.
struct SampleRun {
  reference::TrainConfig config;
  Topology topology;
  std::vector<std::string> without_effect;  // keys of the DeepSpeed config
};
SampleRun sample_run(const std::string& model, uint64_t seed, const std::string& topology,
                     const std::string& deepspeed_config);

}  // namespace isoshard::tools
