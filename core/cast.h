// Casts between floating types, bit for bit as torch does them: round to nearest even, NaN kept as
// NaN. Widening casts are exact. Sources: torch c10/util/BFloat16.h and Half.h (rounding rules).
#pragma once

#include <cstdint>
#include <span>

#include "core/dtype.h"

namespace isoshard {

float float_from_bfloat16(uint16_t bits);
float float_from_half(uint16_t bits);
uint16_t bfloat16_from_float(float value);  // every NaN becomes 0x7FC0, as torch's scalar path does
uint16_t half_from_float(float value);

// A float rounded to float32, bfloat16 or float16, as a float; CheckFailure for other dtypes.
float rounded_to(DType dtype, float value);

// True when cast() knows the pair. Equal types are always known (a copy).
bool can_cast(DType source, DType target);

// Casts count = source.size() / item_size(source) elements; target has room for exactly as many.
void cast(DType source_dtype, std::span<const std::byte> source, DType target_dtype,
          std::span<std::byte> target);

}  // namespace isoshard
