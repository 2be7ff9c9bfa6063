// ISA-L's reflected CRC functions invert the register on entry and exit; raw registers pass through
// them inverted.
#include "checkpoint/format/crc.h"

#include <isa-l/crc.h>
#include <isa-l/crc64.h>
#include <openssl/evp.h>

#include <array>
#include <cstdio>
#include <new>

#include "core/mutant.h"

namespace isoshard::checkpoint {
namespace {

const unsigned char* data_of(std::span<const std::byte> bytes) {
  return reinterpret_cast<const unsigned char*>(bytes.data());
}

}  // namespace

uint32_t crc32_of(std::span<const std::byte> bytes) {
  return bytes.empty() ? 0 : crc32_gzip_refl(0, data_of(bytes), bytes.size());
}

void RawCrcs::update(std::span<const std::byte> bytes) {
  if (bytes.empty()) return;
  crc32 =
      ~crc32_gzip_refl(~static_cast<uint32_t>(crc32), data_of(bytes), bytes.size()) & 0xFFFFFFFFu;
  ecma = ~crc64_ecma_refl(~ecma, data_of(bytes), bytes.size());
  jones = ~crc64_jones_refl(mutant("jones_register_kept") ? ~0ull : ~jones, data_of(bytes),
                            bytes.size());
}

std::string sha256_hex(const std::string& text) {
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest;
  unsigned int size = 0;
  // Of a known algorithm over memory, nothing but the context that it allocates can fail.
  if (EVP_Digest(text.data(), text.size(), digest.data(), &size, EVP_sha256(), nullptr) != 1)
    throw std::bad_alloc();
  std::string hex;
  for (unsigned int i = 0; i < size; ++i) {
    char buffer[3];
    std::snprintf(buffer, sizeof buffer, "%02x", digest[i]);
    hex += buffer;
  }
  return hex;
}

std::string hex16(uint64_t value) {
  char buffer[17];
  std::snprintf(buffer, sizeof buffer, "%016llx", static_cast<unsigned long long>(value));
  return buffer;
}

}  // namespace isoshard::checkpoint
