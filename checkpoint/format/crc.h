// CRCs over bytes, at memory speed (ISA-L). Combination is core/polynomial.h's business.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace isoshard::checkpoint {

// The ordinary CRC-32 of zip.
uint32_t crc32_of(std::span<const std::byte> bytes);

// Three raw CRC registers (init 0, no final inversion) advanced together over a run of bytes.
struct RawCrcs {
  uint64_t crc32 = 0;
  uint64_t ecma = 0;
  uint64_t jones = 0;
  void update(std::span<const std::byte> bytes);
};

std::string sha256_hex(const std::string& text);
std::string hex16(uint64_t value);  // 16 lower-case hexadecimal digits

}  // namespace isoshard::checkpoint
