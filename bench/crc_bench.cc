// CRCs over memory, beside a plain copy of the same bytes: what a check costs while data moves.
#include <benchmark/benchmark.h>

#include <cstring>
#include <string>
#include <vector>

#include "checkpoint/format/crc.h"
#include "core/check.h"
#include "core/polynomial.h"

namespace isoshard {
namespace {

using checkpoint::crc32_of;
using checkpoint::RawCrcs;

std::vector<std::byte> some_bytes(int64_t size_bytes) {
  std::vector<std::byte> bytes(static_cast<size_t>(size_bytes));
  uint64_t value = 1;
  for (std::byte& byte : bytes) {
    value = value * 6364136223846793005u + 1442695040888963407u;
    byte = static_cast<std::byte>(value >> 56);
  }
  return bytes;
}

// The check values that every catalogue of CRCs gives.
void check_crcs() {
  const std::string text = "123456789";
  const auto bytes = std::as_bytes(std::span(text));
  CHECK(crc32_of(bytes) == 0xCBF43926u, "crc32 of 123456789");
  RawCrcs crcs;
  crcs.update(bytes);
  CHECK(crc64_ecma_polynomial().finish(crcs.ecma, 9) == 0x995DC9BBDF1939FAu, "crc64 ecma");
  CHECK(crc32_polynomial().finish(crcs.crc32, 9) == 0xCBF43926u, "raw crc32");
}

void crc32(benchmark::State& state) {
  check_crcs();
  const std::vector<std::byte> bytes = some_bytes(state.range(0));
  for (auto _ : state) benchmark::DoNotOptimize(crc32_of(bytes));
  state.SetBytesProcessed(state.iterations() * state.range(0));
}

void three_crcs(benchmark::State& state) {
  check_crcs();
  const std::vector<std::byte> bytes = some_bytes(state.range(0));
  for (auto _ : state) {
    RawCrcs crcs;
    crcs.update(bytes);
    benchmark::DoNotOptimize(crcs);
  }
  state.SetBytesProcessed(state.iterations() * state.range(0));
}

void copy(benchmark::State& state) {
  const std::vector<std::byte> bytes = some_bytes(state.range(0));
  std::vector<std::byte> target(bytes.size());
  for (auto _ : state) {
    std::memcpy(target.data(), bytes.data(), bytes.size());
    benchmark::DoNotOptimize(target.data());
    benchmark::ClobberMemory();
  }
  CHECK(target == bytes, "the copy");
  state.SetBytesProcessed(state.iterations() * state.range(0));
}

// One step of combination: what each piece that moves costs beside its bytes.
void shift(benchmark::State& state) {
  const CrcPolynomial& polynomial = crc64_ecma_polynomial();
  CHECK(polynomial.shift(polynomial.shift(5, 3), 4) == polynomial.shift(5, 7), "shifts add up");
  int64_t bytes = 1;
  for (auto _ : state) {
    benchmark::DoNotOptimize(polynomial.shift(0x123456789ABCDEF0u, bytes));
    bytes = (bytes * 5 + 1) & ((int64_t{1} << 40) - 1);
  }
  state.SetItemsProcessed(state.iterations());
}

BENCHMARK(crc32)->Arg(64 << 10)->Arg(1 << 20)->Arg(64 << 20);
BENCHMARK(three_crcs)->Arg(64 << 10)->Arg(1 << 20)->Arg(64 << 20);
BENCHMARK(copy)->Arg(64 << 10)->Arg(1 << 20)->Arg(64 << 20);
BENCHMARK(shift);

}  // namespace
}  // namespace isoshard
