// Element casts in plain loops; every conversion that a checkpoint conversion needs goes through
// fp32 (buffers and counters become fp32 in a universal checkpoint, masters become bf16 or fp16).
#include "core/cast.h"

#include <bit>
#include <cstring>

#include "core/check.h"
#include "core/error.h"
#include "core/mutant.h"

namespace isoshard {
namespace {

template <typename T>
T load(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

template <typename T>
void store(std::byte* at, T value) {
  std::memcpy(at, &value, sizeof value);
}

float to_float(DType dtype, const std::byte* at) {
  switch (dtype) {
    case DType::kFloat64:
      return static_cast<float>(load<double>(at));
    case DType::kFloat32:
      return load<float>(at);
    case DType::kFloat16:
      return float_from_half(load<uint16_t>(at));
    case DType::kBFloat16:
      return float_from_bfloat16(load<uint16_t>(at));
    case DType::kInt64:
      return static_cast<float>(load<int64_t>(at));
    case DType::kInt32:
      return static_cast<float>(load<int32_t>(at));
    case DType::kInt16:
      return static_cast<float>(load<int16_t>(at));
    case DType::kInt8:
      return mutant("int8_unsigned") ? load<uint8_t>(at) : static_cast<float>(load<int8_t>(at));
    case DType::kUInt8:
      return static_cast<float>(load<uint8_t>(at));
    case DType::kBool:
      return mutant("bool_kept_as_byte") ? load<uint8_t>(at) : load<uint8_t>(at) ? 1.0f : 0.0f;
    default:
      break;
  }
  fail_check("to_float", __FILE__, __LINE__, name(dtype));
}

// The loops over whole buffers take and give bits and have no branch, so that compilers turn them
// into vectors; cast_test holds those of half to the branching functions below.
uint32_t wide_from_bfloat16(uint16_t bits) { return static_cast<uint32_t>(bits) << 16; }

uint16_t bfloat16_from_wide(uint32_t bits) {
  const uint32_t half = mutant("bfloat16_truncates") ? 0u : 0x7FFFu + ((bits >> 16) & 1u);
  const uint32_t rounded = (bits + half) >> 16;
  return static_cast<uint16_t>(
      (bits & 0x7FFFFFFFu) > 0x7F800000u && !mutant("bfloat16_nan_overflows") ? 0x7FC0u : rounded);
}

uint32_t wide_from_half(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7FFFu) << 13;
  const uint32_t normal = magnitude + (112u << 23), special = magnitude + (224u << 23);
  // A denormal is its mantissa in units of 2^-24: exact as a difference of two floats.
  const float small = std::bit_cast<float>(magnitude + (113u << 23)) - 0x1p-14f;
  const uint32_t wide = magnitude >= (31u << 23) ? special
                        : magnitude < (1u << 23) ? std::bit_cast<uint32_t>(small)
                                                 : normal;
  return sign | wide;
}

uint16_t half_from_wide(uint32_t bits) {
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves a denormal's bits, rounded to nearest even, at the end of the mantissa.
  const uint32_t small =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - (126u << 23);
  const uint32_t finite =
      magnitude < (113u << 23) ? (mutant("half_denormal_flushed") ? 0u : small) : normal;
  const uint32_t infinite = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  return static_cast<uint16_t>(
      sign | (magnitude >= 0x47800000u && !mutant("half_overflow_saturates") ? infinite : finite));
}

template <typename Source, typename Target, Target convert(Source)>
void cast_each(std::span<const std::byte> source, std::span<std::byte> target) {
  const size_t count = source.size() / sizeof(Source);
  for (size_t i = 0; i < count; ++i) {
    store(target.data() + i * sizeof(Target),
          convert(load<Source>(source.data() + i * sizeof(Source))));
  }
}

// The pairs of a master and its copy, on which conversions spend their time. False: another pair.
bool cast_common(DType source_dtype, std::span<const std::byte> source, DType target_dtype,
                 std::span<std::byte> target) {
  const auto is = [&](DType from, DType to) { return source_dtype == from && target_dtype == to; };
  if (is(DType::kFloat32, DType::kBFloat16)) {
    cast_each<uint32_t, uint16_t, bfloat16_from_wide>(source, target);
  } else if (is(DType::kFloat32, DType::kFloat16)) {
    cast_each<uint32_t, uint16_t, half_from_wide>(source, target);
  } else if (is(DType::kBFloat16, DType::kFloat32)) {
    cast_each<uint16_t, uint32_t, wide_from_bfloat16>(source, target);
  } else if (is(DType::kFloat16, DType::kFloat32)) {
    cast_each<uint16_t, uint32_t, wide_from_half>(source, target);
  } else {
    return false;
  }
  return true;
}

}  // namespace

float float_from_bfloat16(uint16_t bits) { return std::bit_cast<float>(wide_from_bfloat16(bits)); }

float float_from_half(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  uint32_t exponent = (bits >> 10) & 0x1Fu;
  uint32_t mantissa = bits & 0x3FFu;
  if (exponent == 0x1F) return std::bit_cast<float>(sign | 0x7F800000u | (mantissa << 13));
  if (exponent == 0) {
    if (mantissa == 0) return std::bit_cast<float>(sign);
    exponent = mutant("half_denormal_exponent") ? 0 : 1;
    while ((mantissa & 0x400u) == 0) {
      mantissa <<= 1;
      --exponent;
    }
    mantissa &= 0x3FFu;
  }
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

uint16_t bfloat16_from_float(float value) {
  return bfloat16_from_wide(std::bit_cast<uint32_t>(value));
}

uint16_t half_from_float(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return sign | 0x7E00u;
  if (magnitude >= 0x47800000u) return sign | 0x7C00u;  // 65536 and above, infinity included
  if (magnitude < 0x33000000u) return sign;             // below half of the smallest denormal
  const int exponent = static_cast<int>(magnitude >> 23) - 127;
  uint32_t mantissa = (magnitude & 0x7FFFFFu) | 0x800000u;
  const int shift = exponent < -14 ? 13 + (-14 - exponent) : 13;
  const uint32_t half_way = 1u << (shift - 1);
  const uint32_t rest = mantissa & ((1u << shift) - 1);
  mantissa >>= shift;
  if (rest > half_way || (rest == half_way && (mutant("half_ties_up") || (mantissa & 1u))))
    ++mantissa;
  // The carry out of the mantissa runs into the exponent, which is what rounding must do.
  const uint32_t base = exponent < -14 ? 0 : static_cast<uint32_t>(exponent + 14) << 10;
  return static_cast<uint16_t>(sign | (base + mantissa));
}

float rounded_to(DType dtype, float value) {
  switch (dtype) {
    case DType::kFloat32:
      return value;
    case DType::kBFloat16:
      return float_from_bfloat16(bfloat16_from_float(value));
    case DType::kFloat16:
      return float_from_half(half_from_float(value));
    default:
      CHECK(false, std::string("nothing is rounded to ") + name(dtype));
  }
  return value;
}

bool can_cast(DType source, DType target) {
  if (source == target) return true;
  const bool known_source = source <= DType::kBool;
  const bool known_target =
      target == DType::kFloat32 || target == DType::kBFloat16 || target == DType::kFloat16;
  return known_source && known_target;
}

void cast(DType source_dtype, std::span<const std::byte> source, DType target_dtype,
          std::span<std::byte> target) {
  const int64_t source_item = item_size_bytes(source_dtype);
  const int64_t target_item = item_size_bytes(target_dtype);
  const int64_t count = static_cast<int64_t>(source.size()) / source_item;
  CHECK(count * target_item == static_cast<int64_t>(target.size()), "cast sizes");
  if (count == 0) return;
  if (source_dtype == target_dtype) {
    std::memcpy(target.data(), source.data(), source.size());
    return;
  }
  CHECK(can_cast(source_dtype, target_dtype), name(source_dtype));
  if (cast_common(source_dtype, source, target_dtype, target)) return;
  for (int64_t i = 0; i < count; ++i) {
    const float value = to_float(source_dtype, source.data() + i * source_item);
    std::byte* at = target.data() + i * target_item;
    if (target_dtype == DType::kFloat32) store(at, value);
    if (target_dtype == DType::kBFloat16) store(at, bfloat16_from_float(value));
    if (target_dtype == DType::kFloat16) store(at, half_from_float(value));
  }
}

}  // namespace isoshard
