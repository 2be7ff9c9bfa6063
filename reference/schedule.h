// Learning rates by step and loss scales by overflow: pure functions of a saved state.
#pragma once

#include <cstdint>

#include "core/training_state.h"

namespace isoshard::reference {

// deepspeed/runtime/lr_schedules.py: WarmupLR, WarmupDecayLR, WarmupCosineLR.
enum class ScheduleKind { kConstant, kWarmup, kWarmupDecay, kWarmupCosine };

struct ScheduleConfig {
  ScheduleKind kind = ScheduleKind::kConstant;
  double min_lr = 0.0;
  double max_lr = 1e-2;      // kConstant and kWarmupCosine: the optimizer's own rate
  int64_t warmup_steps = 4;  // at least 2 are taken
  int64_t total_steps = 40;
  double warmup_min_ratio = 0.0;   // kWarmupCosine, of max_lr: where the warm-up begins
  double cosine_min_ratio = 0.01;  // kWarmupCosine, of max_lr: where the cosine ends
  bool log_warmup = false;         // warmup_type "log"
};

// The rate that the optimizer uses while the schedule stands at `last_batch_iteration`. DeepSpeed
// moves the schedule behind every step but asks it for a rate before the first one too: it stands
// at −1 then, where the rate is min_lr, or 0 of kWarmupCosine, and at 0 in the second step.
double learning_rate(const ScheduleConfig& config, int64_t last_batch_iteration);

// What DynamicLossScaler makes of a step; nothing of a scale that is not dynamic.
void update_scale(LossScale* state, bool overflow);

}  // namespace isoshard::reference
