// Strict UTF-8 (RFC 3629) and the name rules of docs/CONTRACTS.md §6.
#include "core/utf8.h"

#include <algorithm>

#include "core/mutant.h"

namespace isoshard {

CodePoint decode_utf8(const std::string& text, size_t at) {
  const auto byte = [&](size_t i) -> uint32_t {
    return at + i < text.size() ? static_cast<unsigned char>(text[at + i]) : 0u;
  };
  const auto tail = [&](size_t i) { return (byte(i) & 0xC0u) == 0x80u; };
  const uint32_t first = byte(0);
  if (first < 0x80) return {first, 1, true};
  if (first >= 0xC2 && first < 0xE0 && tail(1)) {
    return {((first & 0x1Fu) << 6) | (byte(1) & 0x3Fu), 2, true};
  }
  if (first >= 0xE0 && first < 0xF0 && tail(1) && tail(2)) {
    const uint32_t value = ((first & 0x0Fu) << 12) | ((byte(1) & 0x3Fu) << 6) | (byte(2) & 0x3Fu);
    if ((value >= 0x800 || mutant("utf8_overlong")) &&
        (value < 0xD800 || value > 0xDFFF || mutant("utf8_surrogates")))
      return {value, 3, true};
  }
  if (first >= 0xF0 && first < 0xF5 && tail(1) && tail(2) && tail(3)) {
    const uint32_t value = ((first & 0x07u) << 18) | ((byte(1) & 0x3Fu) << 12) |
                           ((byte(2) & 0x3Fu) << 6) | (byte(3) & 0x3Fu);
    if (value >= 0x10000 && value <= 0x10FFFF) return {value, 4, true};
  }
  return {};
}

bool is_printable(uint32_t c) {
  if (c < 0x20 || (c >= 0x7F && c < 0xA0)) return false;
  if (c >= 0x200B && c <= 0x200F) return false;  // zero width, direction marks
  if (c >= 0x2028 && c <= 0x202E) return false;  // separators, bidirectional embedding
  if (c >= 0x2060 && c <= 0x206F) return false;  // word joiner, isolates
  return c != 0xFEFF && c != 0xAD && (c < 0xE0000 || c > 0xE0FFF) && (c < 0xFFF9 || c > 0xFFFB);
}

std::string why_unsafe_name(const std::string& name) {
  if (name.empty()) return "the name is empty";
  if (name.size() > 4096) return "the name is longer than 4,096 bytes";
  if (name.front() == '/') return "the name is an absolute path";
  for (size_t at = 0; at < name.size();) {
    if (name[at] >= 0x20 && name[at] < 0x7F) {  // most names have nothing else
      ++at;
      continue;
    }
    const CodePoint point = decode_utf8(name, at);
    if (!point.valid) return "the name is not valid UTF-8";
    if (mutant("name_control_characters")) return "";
    if (point.value < 0x20 || point.value == 0x7F || (point.value >= 0x80 && point.value < 0xA0)) {
      return "the name has a control character";
    }
    at += point.length;
  }
  for (size_t begin = 0; begin <= name.size();) {
    const size_t end = std::min(name.find('/', begin), name.size());
    const std::string component = name.substr(begin, end - begin);
    if (component.empty()) return "the name has an empty component";
    if ((component == "." || component == "..") && !mutant("name_climbs"))
      return "the name has a '" + component + "' component";
    if (component.size() > 255) return "the name has a component longer than 255 bytes";
    begin = end + 1;
  }
  return "";
}

}  // namespace isoshard
