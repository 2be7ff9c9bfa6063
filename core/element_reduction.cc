// See element_reduction.h.
#include "core/element_reduction.h"

#include <algorithm>
#include <cstring>

#include "core/check.h"

namespace isoshard {
namespace {

template <typename T>
T sum_of(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    using U = std::make_unsigned_t<T>;
    return static_cast<T>(static_cast<U>(static_cast<U>(a) + static_cast<U>(b)));
  } else {
    return a + b;
  }
}

template <typename T>
void reduce(Buffer target, ConstBuffer source, Reduction reduction) {
  for (int64_t i = 0; i < target.count; ++i) {
    T a, b;
    std::memcpy(&a, target.data + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    std::memcpy(&b, source.data + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    a = reduction == Reduction::kMax ? std::max(a, b) : sum_of(a, b);
    std::memcpy(target.data + i * static_cast<int64_t>(sizeof(T)), &a, sizeof(T));
  }
}

}  // namespace

void reduce_into(Buffer target, ConstBuffer source, Reduction reduction) {
  CHECK(target.dtype == source.dtype && target.count == source.count, "two different buffers");
  switch (target.dtype) {
    case DType::kFloat64:
      return reduce<double>(target, source, reduction);
    case DType::kFloat32:
      return reduce<float>(target, source, reduction);
    case DType::kInt64:
      return reduce<int64_t>(target, source, reduction);
    case DType::kInt32:
      return reduce<int32_t>(target, source, reduction);
    case DType::kInt16:
      return reduce<int16_t>(target, source, reduction);
    case DType::kInt8:
      return reduce<int8_t>(target, source, reduction);
    case DType::kUInt64:
      return reduce<uint64_t>(target, source, reduction);
    case DType::kUInt32:
      return reduce<uint32_t>(target, source, reduction);
    case DType::kUInt16:
      return reduce<uint16_t>(target, source, reduction);
    case DType::kUInt8:
      return reduce<uint8_t>(target, source, reduction);
    default:
      CHECK(false, std::string("no reduction of ") + name(target.dtype));
  }
}

}  // namespace isoshard
