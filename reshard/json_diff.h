// Where two JSON documents differ, path by path: for the hyper section of diff.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace isoshard::reshard {

struct JsonDifference {
  std::string path;  // such as "loss_scaler.dynamic" or "param_groups[0].lr"
  std::string a, b;  // values as text, shortened; "absent" on the side that lacks the path
};

struct JsonComparison {
  std::vector<JsonDifference> differences;
  int64_t values = 0;  // compared: numbers, strings, booleans, nulls, and what stands on one side
};

JsonComparison compare_json(const nlohmann::json& a, const nlohmann::json& b);

}  // namespace isoshard::reshard
