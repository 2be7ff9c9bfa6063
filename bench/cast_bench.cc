// Casts between floating types; bytes are those read plus those written, as for a copy.
#include <benchmark/benchmark.h>

#include <cstdint>
#include <vector>

#include "core/cast.h"
#include "core/check.h"

namespace isoshard {
namespace {

std::vector<float> some_values(int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  uint32_t value = 1;
  for (float& element : values) {
    value = value * 1664525u + 1013904223u;
    element = static_cast<float>(static_cast<int32_t>(value)) * 0x1p-28f;  // within ±8
  }
  return values;
}

std::vector<std::byte> cast_all(DType source, std::span<const std::byte> bytes, DType target) {
  const auto count = static_cast<int64_t>(bytes.size()) / item_size_bytes(source);
  std::vector<std::byte> result(static_cast<size_t>(count * item_size_bytes(target)));
  cast(source, bytes, target, result);
  return result;
}

// Every element as the functions for one element say, and widening is exact: narrow(wide(x)) = x.
void check_casts(DType narrow) {
  const std::vector<float> values = some_values(4097);
  const std::vector<std::byte> low =
      cast_all(DType::kFloat32, std::as_bytes(std::span(values)), narrow);
  const auto* bits = reinterpret_cast<const uint16_t*>(low.data());
  for (size_t i = 0; i < values.size(); ++i) {
    const bool bfloat = narrow == DType::kBFloat16;
    CHECK(bits[i] == (bfloat ? bfloat16_from_float(values[i]) : half_from_float(values[i])), "one");
  }
  const std::vector<std::byte> wide = cast_all(narrow, low, DType::kFloat32);
  CHECK(cast_all(DType::kFloat32, wide, narrow) == low, "there and back");
}

void run_cast(benchmark::State& state, DType source, DType target) {
  check_casts(source == DType::kFloat32 ? target : source);
  const std::vector<float> values = some_values(state.range(0));
  std::vector<std::byte> bytes =
      cast_all(DType::kFloat32, std::as_bytes(std::span(values)), source);
  std::vector<std::byte> result = cast_all(source, bytes, target);
  for (auto _ : state) {
    cast(source, bytes, target, result);
    benchmark::DoNotOptimize(result.data());
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * static_cast<int64_t>(bytes.size() + result.size()));
}

void bfloat16_to_float(benchmark::State& state) {
  run_cast(state, DType::kBFloat16, DType::kFloat32);
}
void half_to_float(benchmark::State& state) { run_cast(state, DType::kFloat16, DType::kFloat32); }
void float_to_bfloat16(benchmark::State& state) {
  run_cast(state, DType::kFloat32, DType::kBFloat16);
}
void float_to_half(benchmark::State& state) { run_cast(state, DType::kFloat32, DType::kFloat16); }

// 2^18 elements: the executor's chunk of 1 MiB.
BENCHMARK(bfloat16_to_float)->Arg(1 << 18);
BENCHMARK(half_to_float)->Arg(1 << 18);
BENCHMARK(float_to_bfloat16)->Arg(1 << 18);
BENCHMARK(float_to_half)->Arg(1 << 18);

}  // namespace
}  // namespace isoshard
