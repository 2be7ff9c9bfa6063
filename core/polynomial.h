// CRC combination: a CRC of a whole is the exclusive-or of its pieces' raw CRCs, each multiplied by
// x^(8·n) modulo the CRC polynomial, n being the bytes that follow the piece. So shards can be
// digested where they lie, in any order, by any number of threads (docs/formats/digest.md).
//
// "raw" means: register starts at 0 and is not inverted at the end. Then
//   crc(whole) = sum of shift(raw(piece), bytes_after)  ^  shift(~0, bytes_total)  ^  ~0.
#pragma once

#include <array>
#include <cstdint>

namespace isoshard {

// Arithmetic modulo one reflected CRC polynomial of `width` bits (32 or 64). A register holds the
// polynomial with the coefficient of x^0 in its top bit.
class CrcPolynomial {
 public:
  CrcPolynomial(uint64_t reflected_polynomial, int width);

  // The register after `bytes` further zero bytes: value · x^(8·bytes).
  uint64_t shift(uint64_t value, int64_t bytes) const;

  // From the sum of shifted raw pieces of a message to its ordinary CRC (init and xorout ~0).
  uint64_t finish(uint64_t raw_sum, int64_t bytes_total) const;

 private:
  uint64_t multiply(uint64_t a, uint64_t b) const;

  uint64_t polynomial_;
  int width_;
  uint64_t mask_;
  std::array<uint64_t, 63> powers_;  // powers_[k] = x^(8·2^k)
};

// CRC-32 of zip (IEEE 802.3), CRC-64/ECMA-182 (as in xz) and CRC-64 of Jones, all reflected.
const CrcPolynomial& crc32_polynomial();
const CrcPolynomial& crc64_ecma_polynomial();
const CrcPolynomial& crc64_jones_polynomial();

}  // namespace isoshard
