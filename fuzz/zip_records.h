// An archive described by bytes, so that a change of them is a change of one record or one field:
//
//   | count | count × ( name length | name | u16 size | data ) | edits: u24 place from the end, xor
//   |
//
// Not verified: that an edit leads to a file that is refused; it may fall on a payload.
#pragma once

#include <string>

#include "fuzz/fuzz_storage.h"

namespace isoshard::fuzz {

struct DescribedZip {
  std::string archive;
  bool edited = false;  // false: an archive as our writer writes it
};

DescribedZip described_zip(Bytes bytes);

}  // namespace isoshard::fuzz
