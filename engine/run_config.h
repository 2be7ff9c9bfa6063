// A DeepSpeed config as far as it steers a run here (deepspeed/runtime/config.py,
// runtime/zero/config.py); every other key is listed, never silently dropped.
#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "core/training_state.h"
#include "engine/checkpoint.h"

namespace isoshard::engine {

struct OptimizerSettings {
  std::string type = "AdamW";  // "AdamW", "Adam", "SGD", "Lion"; of Adam the decoupled form alone
  double lr = 1e-3;
  double beta1 = 0.9, beta2 = 0.999;
  double epsilon = 1e-8;
  double momentum = 0.0;
  double weight_decay = 0.0;
};

struct SchedulerSettings {
  std::string type;     // "" none, "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"
  double min_lr = 0.0;  // of WarmupLR and WarmupDecayLR
  // Of the same two; none is the optimizer's own lr, which WarmupCosineLR takes always.
  std::optional<double> max_lr;
  int64_t warmup_steps = 1000;
  int64_t total_steps = 0;                                 // of the other two than WarmupLR
  bool log_warmup = true;                                  // warmup_type
  double warmup_min_ratio = 0.0, cosine_min_ratio = 1e-4;  // of WarmupCosineLR
};

struct RunConfig {
  int stage = 0;  // zero_optimization.stage
  int tensor = 1, sequence = 1, expert = 1;
  int pipeline = 0;  // pipeline.stages; 0: not given, or "auto"
  DType dtype = DType::kFloat32;
  LossScale loss_scale;                                  // of fp16
  double clip = 1.0;                                     // gradient_clipping; 0: as it is
  int64_t batch = 0, micro_batch = 0, accumulation = 0;  // 0: not given
  bool has_optimizer = false;
  OptimizerSettings optimizer;
  SchedulerSettings scheduler;
  bool load_universal = false;
  TagValidation tag_validation = TagValidation::kWarn;
  std::vector<std::string> without_effect;  // "zero_optimization.overlap_comm", in the file's order
};

// Throws Error(kUsage) that names the key where a value is none (DeepSpeed: DeepSpeedConfigError,
// ValidationError, AssertionError): another type, fp16 and bf16 together, a stage beyond 3, an
// optimizer or schedule that is not simulated, a parameter that its class does not take (TypeError;
// max_grad_norm: ValueError) or that changes its arithmetic and is not simulated. What is not
// given, or "auto" where Hugging Face writes that, has DeepSpeed 0.19.8's default.
RunConfig read_run_config(const Json& config);

// Samples a step and a rank's micro batch for that many data-parallel ranks, where what is given
// determines them: batch = micro batch · accumulation · dp. Throws Error(kUsage) where it
// contradicts itself (DeepSpeed: AssertionError), or says nothing.
struct BatchSizes {
  int64_t batch = 1, micro_batch = 1;
};
BatchSizes batch_sizes(const RunConfig& config, int data_ranks);

}  // namespace isoshard::engine
