// Multiplication modulo a CRC polynomial, by shift and exclusive-or.
#include "core/polynomial.h"

#include "core/check.h"
#include "core/mutant.h"

namespace isoshard {

CrcPolynomial::CrcPolynomial(uint64_t reflected_polynomial, int width)
    : polynomial_(reflected_polynomial),
      width_(width),
      mask_(width == 64 ? ~0ull : (1ull << width) - 1) {
  // In reflected order x^0 is the top bit, so x^8 is the bit eight below it.
  powers_[0] = 1ull << (width_ - 1 - 8);
  for (size_t k = 1; k < powers_.size(); ++k) powers_[k] = multiply(powers_[k - 1], powers_[k - 1]);
}

uint64_t CrcPolynomial::multiply(uint64_t a, uint64_t b) const {
  uint64_t product = 0;
  for (uint64_t bit = 1ull << (width_ - 1); bit != 0; bit >>= 1) {
    product ^= b & (0 - static_cast<uint64_t>((a & bit) != 0));
    b = (b >> 1) ^ (polynomial_ & (0 - (b & 1)));
  }
  return product;
}

uint64_t CrcPolynomial::shift(uint64_t value, int64_t bytes) const {
  CHECK(bytes >= 0, "negative shift");
  if (value == 0) return 0;
  for (int k = 0; bytes != 0; bytes >>= 1, ++k) {
    if ((bytes & 1) && !(mutant("crc_terabytes") && k == 40))
      value = multiply(value, powers_[static_cast<size_t>(k)]);
  }
  return value;
}

uint64_t CrcPolynomial::finish(uint64_t raw_sum, int64_t bytes_total) const {
  return (raw_sum ^ shift(mask_, bytes_total + mutant("crc_length_off_by_one")) ^ mask_) & mask_;
}

const CrcPolynomial& crc32_polynomial() {
  static const CrcPolynomial polynomial(0xEDB88320u, 32);
  return polynomial;
}

const CrcPolynomial& crc64_ecma_polynomial() {
  static const CrcPolynomial polynomial(0xC96C5795D7870F42ull, 64);
  return polynomial;
}

const CrcPolynomial& crc64_jones_polynomial() {
  static const CrcPolynomial polynomial(0x95AC9329AC4BC9B5ull, 64);
  return polynomial;
}

}  // namespace isoshard
