// JSON that a person wrote: no object has a key twice, nothing is nested beyond any use.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace isoshard::checkpoint {

// Throws Error(kUsage) that names `file` for anything else.
nlohmann::json parse_shallow_json(const std::string& text, const std::string& file);

}  // namespace isoshard::checkpoint
