// UTF-8 decoding and the safety of names: which strings may become file names or be printed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace isoshard {

struct CodePoint {
  uint32_t value = 0;
  size_t length = 1;   // bytes consumed, at least 1, also when not valid
  bool valid = false;  // false for overlong forms, surrogates, stray and missing bytes
};

// Decodes the code point that begins at text[at]; at < text.size().
CodePoint decode_utf8(const std::string& text, size_t at);

// False for control characters, line separators, bidirectional marks and zero-width characters.
bool is_printable(uint32_t code_point);

// Why `name` cannot be a parameter name, tag or file name; empty when it can. A name may have
// '/' between ordinary components (contracts §6): absolute, empty, "." and ".." components, NUL,
// control characters, invalid UTF-8 and components over 255 bytes are refused.
std::string why_unsafe_name(const std::string& name);

}  // namespace isoshard
