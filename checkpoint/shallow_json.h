// JSON out of a file that nobody vouches for: no object has a key twice, nothing is nested beyond
// any use, and what is made of the text stays within a budget of memory.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

namespace isoshard::checkpoint {

struct JsonLimits {
  int levels = 64;                            // objects and lists within each other
  int64_t memory_bytes = int64_t{160} << 20;  // of the values, estimated; not of the text
};

struct ShallowJson {
  nlohmann::json value;  // discarded where the text is refused
  std::string why;       // why it is refused; empty where it is not
  std::string key;       // the key that is there twice, where that is why
};

// Never throws for what the text holds. Takes time in proportion to the text.
ShallowJson read_shallow_json(const std::string& text, const JsonLimits& limits = {});

// JSON that a person wrote: throws Error(kUsage) that names `file` for all that is refused above.
nlohmann::json parse_shallow_json(const std::string& text, const std::string& file);

}  // namespace isoshard::checkpoint
