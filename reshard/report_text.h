// The wording that reports of this folder share.
#pragma once

#include <string>
#include <vector>

namespace isoshard::reshard {

// A sentence, and the details of a few, each on its own line.
inline std::string with_details(std::string text, const std::vector<std::string>& details) {
  constexpr size_t kShown = 5;
  for (size_t i = 0; i < details.size() && i < kShown; ++i) text += "\n" + details[i];
  if (details.size() > kShown) {
    text += "\n… and " + std::to_string(details.size() - kShown) + " more";
  }
  return text;
}

inline std::string count_of(size_t count, const std::string& noun) {
  return std::to_string(count) + " " + noun + (count == 1 ? "" : "s");
}

// Every line but the first is moved in.
inline std::string moved_in(const std::string& text, size_t spaces) {
  std::string result;
  for (const char c : text) {
    result += c;
    if (c == '\n') result += std::string(spaces, ' ');
  }
  return result;
}

}  // namespace isoshard::reshard
