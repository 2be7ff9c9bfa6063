// See sample_model.h.
#include "tools/sample_model.h"

#include "core/error.h"

namespace isoshard::tools {

reference::TrainConfig sample_model(const std::string& name, uint64_t seed) {
  reference::TrainConfig config;
  reference::ModelConfig& m = config.model;
  m.seed = seed;
  config.data.seed = seed;
  config.clip = 1.0;
  if (name == "tiny") return config;
  m.vocabulary = 64;
  m.hidden = 32;
  m.head_size = 8;
  m.intermediate = 48;
  m.dtype = DType::kBFloat16;
  config.data.batch = 8;
  if (name == "llama") return config;
  if (name == "mixtral") {
    m.hidden = 16;
    m.head_size = 4;
    m.experts = 8;
    m.expert_intermediate = 24;
    return config;
  }
  if (name == "llama-fp32") {
    m.dtype = DType::kFloat32;
    return config;
  }
  throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                        .what = "There is no such model.",
                        .entry = quote(name),
                        .expected = kSampleModels,
                        .next = "correct --model"});
}

}  // namespace isoshard::tools
