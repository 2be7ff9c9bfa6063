// Integer division that says what it means.
#pragma once

#include <cstdint>

#include "core/check.h"

namespace isoshard {

inline int64_t div_ceil(int64_t a, int64_t b) {
  CHECK(b > 0, "division by a non-positive number");
  return a >= 0 ? (a + b - 1) / b : -((-a) / b);
}

inline int64_t div_exact(int64_t a, int64_t b) {
  CHECK(b > 0, "division by a non-positive number");
  CHECK(a % b == 0, "division leaves a rest");
  return a / b;
}

}  // namespace isoshard
