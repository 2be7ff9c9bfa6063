// The gate's activation: silu(x) = x · σ(x), and its derivative σ(x) (1 + x (1 − σ(x))).
#pragma once

#include "core/exact_math.h"

namespace isoshard::reference {

inline float silu(float x) { return static_cast<float>(x * exact::sigmoid(x)); }

inline float silu_gradient(float x) {
  const double s = exact::sigmoid(x);
  return static_cast<float>(s * (1.0 + x * (1.0 - s)));
}

}  // namespace isoshard::reference
