// libFuzzer's entry of one target, whose name ISOSHARD_FUZZ_TARGET is.
#include "fuzz/targets.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size_bytes) {
  return isoshard::fuzz::ISOSHARD_FUZZ_TARGET::run_one(
      std::as_bytes(std::span<const uint8_t>(data, size_bytes)));
}
