// See schedule.h.
#include "reference/schedule.h"

#include <algorithm>

#include "core/exact_math.h"
#include "core/mutant.h"

namespace isoshard::reference {
namespace {

constexpr double kPi = 3.14159265358979323846;

// deepspeed/runtime/lr_schedules.py with i the iteration, w the steps of the warm-up, T the total
// steps, and γ how much of the way from the least rate to max_lr is done.
struct Position {
  int64_t iteration = 0;
  int64_t warmup = 2;  // steps
  double decay = 1.0;  // steps from the end of the warm-up to total_steps
};

// i < w: γ = log(i + 1) / log w, or i / w
double warmup_share(const Position& p, bool log_warmup) {
  if (p.iteration >= p.warmup) return 1.0;
  const double at = static_cast<double>(p.iteration), steps = static_cast<double>(p.warmup);
  return log_warmup ? 1.0 / exact::log(steps) * exact::log(at + 1) : at / steps;
}

// i >= w: γ = max(0, (T − i) / max(1, T − w))
double decay_share(const ScheduleConfig& c, const Position& p) {
  return std::max(0.0, static_cast<double>(c.total_steps - p.iteration) / p.decay);
}

// WarmupCosineLR, of the optimizer's own rate; r is warmup_min_ratio, e is cosine_min_ratio.
// i < w: r + γ (1 − r)
// i >= w: max(0, e + (1 − e) (1 + cos(π d)) / 2),  d = min(1, (i − w + 1) / max(1, T − w))
double cosine_ratio(const ScheduleConfig& c, const Position& p) {
  if (p.iteration < p.warmup) {
    return c.warmup_min_ratio + warmup_share(p, c.log_warmup) * (1 - c.warmup_min_ratio);
  }
  const double done = std::min(1.0, static_cast<double>(p.iteration - p.warmup + 1) / p.decay);
  const double share = (1 + exact::sine_cosine(kPi * done).cosine) / 2;
  return std::max(0.0, c.cosine_min_ratio + (1 - c.cosine_min_ratio) * share);
}

}  // namespace

double learning_rate(const ScheduleConfig& c, int64_t last_batch_iteration) {
  if (c.kind == ScheduleKind::kConstant) return c.max_lr;
  const bool cosine = c.kind == ScheduleKind::kWarmupCosine;
  if (last_batch_iteration < 0) return cosine ? 0.0 : c.min_lr;
  const int64_t warmup = std::max<int64_t>(mutant("warmup_one_step") ? 1 : 2, c.warmup_steps);
  const Position p{.iteration = last_batch_iteration + mutant("schedule_off_by_one"),
                   .warmup = warmup,
                   .decay = static_cast<double>(std::max<int64_t>(1, c.total_steps - warmup))};
  if (cosine) return c.max_lr * cosine_ratio(c, p);
  const bool decays = c.kind == ScheduleKind::kWarmupDecay && p.iteration >= warmup;
  const double share = decays ? decay_share(c, p) : warmup_share(p, c.log_warmup);
  return c.min_lr + (c.max_lr - c.min_lr) * share;
}

void update_scale(LossScale* state, bool overflow) {
  if (!state->dynamic) return;
  if (overflow) {
    if (state->hysteresis == 1 || state->hysteresis_left == 1 || mutant("hysteresis_ignored"))
      state->scale = std::max(state->scale / 2, mutant("least_scale_ignored") ? 0.0 : state->least);
    else
      --state->hysteresis_left;
    state->last_overflow = state->iteration;
  } else {
    const int64_t stable = state->iteration - state->last_overflow - 1;
    if (stable > 0 && (stable + mutant("scale_grows_early")) % state->window == 0) {
      state->hysteresis_left = state->hysteresis;
      state->scale *= 2;
    }
  }
  ++state->iteration;
}

}  // namespace isoshard::reference
