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
  double max_lr = 1e-2;  // kConstant: the rate
  int64_t warmup_steps = 4;
  int64_t total_steps = 40;
  double cosine_min_ratio = 0.01;
  bool log_warmup = false;  // warmup_type "log" of WarmupLR
};

// The rate that the optimizer uses while the schedule stands at `last_batch_iteration`: −1 in the
// first step, which has the same rate as the second, since DeepSpeed moves the schedule behind
// every step but asks it for a rate before the first one too.
double learning_rate(const ScheduleConfig& config, int64_t last_batch_iteration);

// What DynamicLossScaler makes of a step; nothing of a scale that is not dynamic.
void update_scale(LossScale* state, bool overflow);

}  // namespace isoshard::reference
