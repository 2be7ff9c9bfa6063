// See optimizer.h. Scalars are doubles until they meet a tensor, as torch has them; a
// multiplication and an addition of one torch operation are one fma, as its processors' kernels
// have them.
#include "reference/optimizer.h"

#include <cmath>

#include "core/check.h"
#include "core/exact_math.h"
#include "core/mutant.h"

namespace isoshard::reference {
namespace {

// m ← m + (1 − β₁)(g − m),  v ← β₂ v + (1 − β₂) g g,
// θ ← θ (1 − lr λ),  θ ← θ − (lr / (1 − β₁ᵗ)) m / (√v / √(1 − β₂ᵗ) + ε)
void adamw(const OptimizerConfig& c, const StepArguments& a) {
  const float decay = static_cast<float>(1 - a.lr * a.weight_decay);
  const float w1 = static_cast<float>(1 - c.beta1), b2 = static_cast<float>(c.beta2);
  const float w2 = static_cast<float>(1 - c.beta2), epsilon = static_cast<float>(c.epsilon);
  const double correction1 = 1 - exact::power(c.beta1, a.step);
  const double correction2 = mutant("bias_uncorrected") ? 1.0 : 1 - exact::power(c.beta2, a.step);
  const float rate = static_cast<float>(-(a.lr / correction1));
  const float root2 = static_cast<float>(std::sqrt(correction2));
  for (size_t i = 0; i < a.master.size(); ++i) {
    float& p = a.master[i];
    float& m = a.states[0][i];
    float& v = a.states[1][i];
    const float g = a.gradient[i];
    if (!mutant("decay_forgotten")) p = p * decay;
    // torch's lerp goes from the nearer end.
    m = w1 < 0.5f ? std::fma(w1, g - m, m) : std::fma(-(g - m), 1.0f - w1, g);
    if (!mutant("second_moment_not_stepped")) v = std::fma(w2 * g, g, v * b2);
    const float denominator = std::sqrt(v) / root2 + epsilon;
    p = p + rate * m / denominator;
  }
}

// g ← g + λ θ,  b ← μ b + g (the first step: g),  θ ← θ − lr b
void sgd(const OptimizerConfig& c, const StepArguments& a) {
  const float decay = static_cast<float>(a.weight_decay), mu = static_cast<float>(c.momentum);
  const float rate = static_cast<float>(-a.lr);
  for (size_t i = 0; i < a.master.size(); ++i) {
    float& p = a.master[i];
    float& b = a.states[0][i];
    const float g = a.weight_decay != 0 ? std::fma(decay, p, a.gradient[i]) : a.gradient[i];
    b = a.step == 1 ? g : b * (mutant("sgd_momentum_kept_whole") ? 1.0f : mu) + g;
    p = std::fma(rate, b, p);
  }
}

// u = sign(β₁ m + (1 − β₁) g),  θ ← θ (1 − lr λ) − lr u,  m ← β₂ m + (1 − β₂) g
void lion(const OptimizerConfig& c, const StepArguments& a) {
  const float decay = static_cast<float>(1 - a.lr * a.weight_decay);
  const float b1 = static_cast<float>(c.beta1), w1 = static_cast<float>(1 - c.beta1);
  const float b2 = static_cast<float>(c.beta2), w2 = static_cast<float>(1 - c.beta2);
  const float rate = static_cast<float>(a.lr);
  for (size_t i = 0; i < a.master.size(); ++i) {
    float& p = a.master[i];
    float& m = a.states[0][i];
    const float g = a.gradient[i];
    const float u = (mutant("lion_betas_exchanged") ? b2 : b1) * m + w1 * g;
    p = p * decay;
    p = p - rate * (u > 0 || (mutant("lion_zero_moves") && u == 0) ? 1.0f : u < 0 ? -1.0f : 0.0f);
    m = b2 * m + w2 * g;
  }
}

// s ← d s + (1 − d) g or (1 − d) g g,  θ ← θ (1 − lr λ) − lr Σ s / (1 + |s|)
void custom(const OptimizerConfig& c, const StepArguments& a) {
  const float decay = static_cast<float>(1 - a.lr * a.weight_decay);
  const float rate = static_cast<float>(a.lr);
  for (size_t i = 0; i < a.master.size(); ++i) {
    const float g = a.gradient[i];
    float sum = 0.0f;
    for (size_t k = 0; k < c.states.size(); ++k) {
      const CustomState& kept = c.states[k];
      float& s = a.states[k][i];
      s = kept.decay * s + (1.0f - kept.decay) * (kept.squared ? g * g : g);
      sum = sum + s / (1.0f + std::fabs(s));
    }
    a.master[i] = a.master[i] * decay - rate * sum;
  }
}

}  // namespace

const char* name(OptimizerKind kind) {
  switch (kind) {
    case OptimizerKind::kAdamW:
      return "AdamW";
    case OptimizerKind::kSgd:
      return "SGD";
    case OptimizerKind::kLion:
      return "Lion";
    case OptimizerKind::kCustom:
      break;
  }
  return "custom";
}

std::vector<std::string> state_names(const OptimizerConfig& config) {
  switch (config.kind) {
    case OptimizerKind::kAdamW:
      return {"exp_avg", "exp_avg_sq"};
    case OptimizerKind::kSgd:
      return {"momentum_buffer"};
    case OptimizerKind::kLion:
      return {"exp_avg"};
    case OptimizerKind::kCustom:
      break;
  }
  std::vector<std::string> names;
  for (const CustomState& state : config.states) names.push_back(state.name);
  return names;
}

bool counts_steps(const OptimizerConfig& config) {
  return config.kind == OptimizerKind::kAdamW ||
         (config.kind == OptimizerKind::kCustom && config.counts);
}

void take_step(const OptimizerConfig& config, const StepArguments& a) {
  CHECK(a.gradient.size() == a.master.size(), "a gradient for each element");
  CHECK(a.states.size() == state_names(config).size(), "the optimizer's own states");
  switch (config.kind) {
    case OptimizerKind::kAdamW:
      return adamw(config, a);
    case OptimizerKind::kSgd:
      return sgd(config, a);
    case OptimizerKind::kLion:
      return lion(config, a);
    case OptimizerKind::kCustom:
      return custom(config, a);
  }
}

}  // namespace isoshard::reference
