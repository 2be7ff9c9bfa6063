// See schedule.h.
#include "reference/schedule.h"

#include <algorithm>

#include "core/exact_math.h"

namespace isoshard::reference {
namespace {

constexpr double kPi = 3.14159265358979323846;

// WarmupLR: 0 … 1 over the warm-up.
double warmup_share(const ScheduleConfig& c, int64_t iteration) {
  const int64_t steps = std::max<int64_t>(2, c.warmup_steps);
  if (iteration >= steps) return 1.0;
  if (c.log_warmup) {
    return exact::log(static_cast<double>(iteration + 1)) / exact::log(static_cast<double>(steps));
  }
  return static_cast<double>(iteration) / static_cast<double>(steps);
}

}  // namespace

double learning_rate(const ScheduleConfig& c, int64_t last_batch_iteration) {
  const int64_t iteration = std::max<int64_t>(0, last_batch_iteration);
  const double total = static_cast<double>(c.total_steps), at = static_cast<double>(iteration);
  switch (c.kind) {
    case ScheduleKind::kConstant:
      return c.max_lr;
    case ScheduleKind::kWarmup:
      return c.min_lr + (c.max_lr - c.min_lr) * warmup_share(c, iteration);
    case ScheduleKind::kWarmupDecay: {
      double share = warmup_share(c, iteration);
      if (iteration >= c.warmup_steps) {
        const double rest = std::max(1.0, total - static_cast<double>(c.warmup_steps));
        share = std::max(0.0, (total - at) / rest);
      }
      return c.min_lr + (c.max_lr - c.min_lr) * share;
    }
    case ScheduleKind::kWarmupCosine:
      break;
  }
  if (iteration < c.warmup_steps) return c.max_lr * warmup_share(c, iteration);
  const double rest = std::max(1.0, total - static_cast<double>(c.warmup_steps));
  const double done = std::min(1.0, (at - static_cast<double>(c.warmup_steps) + 1) / rest);
  const double cosine = (1 + exact::sine_cosine(kPi * done).cosine) / 2;
  return c.max_lr * (c.cosine_min_ratio + (1 - c.cosine_min_ratio) * cosine);
}

void update_scale(LossScale* state, bool overflow) {
  if (!state->dynamic) return;
  if (overflow) {
    if (state->hysteresis == 1 || state->hysteresis_left == 1)
      state->scale = std::max(state->scale / 2, state->least);
    else
      --state->hysteresis_left;
    state->last_overflow = state->iteration;
  } else {
    const int64_t stable = state->iteration - state->last_overflow - 1;
    if (stable > 0 && stable % state->window == 0) {
      state->hysteresis_left = state->hysteresis;
      state->scale *= 2;
    }
  }
  ++state->iteration;
}

}  // namespace isoshard::reference
