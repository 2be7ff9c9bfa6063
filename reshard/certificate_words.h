// What is taken from a certificate, whoever wrote it: any form, any characters.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "core/error.h"

namespace isoshard::reshard {

// A member of an object within an object; null where either is not there or something else.
inline nlohmann::json member_of(const nlohmann::json& object, const char* outer,
                                const char* inner) {
  if (!object.is_object()) return nullptr;
  const auto within = object.find(outer);
  if (within == object.end() || !within->is_object()) return nullptr;
  const auto found = within->find(inner);
  return found == within->end() ? nlohmann::json(nullptr) : *found;
}

// A sentence of a file, of whatever lines: nothing that a terminal obeys, its quotes as they are.
inline std::string sentence_of_file(const std::string& text) {
  std::string quoted = quote(text), result;
  for (size_t i = 1; i + 1 < quoted.size(); ++i) {
    const bool escaped = quoted[i] == '\\' && quoted[i + 1] == '"' && i + 2 < quoted.size();
    if (!escaped) result += quoted[i];
  }
  for (size_t at = 0; (at = result.find("\\u{a}", at)) != std::string::npos;)
    result.replace(at, 5, "; ");
  return result;
}

}  // namespace isoshard::reshard
