// See json_diff.h.
#include "reshard/json_diff.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>

#include "reshard/tensor_values.h"

namespace isoshard::reshard {
namespace {

using nlohmann::json;

constexpr size_t kShownBytes = 72;

// The tagged float of hyper_json: {"float": "0x1p+0"}.
bool is_float(const json& value) {
  return value.is_object() && value.size() == 1 && value.contains("float") &&
         value["float"].is_string();
}

std::string value_of(const json& value) {
  if (is_float(value)) {
    char buffer[64];
    const double number =
        std::strtod(value["float"].get_ref<const std::string&>().c_str(), nullptr);
    std::string text(buffer, std::to_chars(buffer, buffer + sizeof buffer, number).ptr);
    const bool whole = text.find_first_not_of("-0123456789") == std::string::npos;
    return whole ? text + ".0" : text;
  }
  const std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
  return text.size() <= kShownBytes ? text : text.substr(0, kShownBytes) + " …";
}

class Walk {
 public:
  void compare(const std::string& path, const json& a, const json& b) {
    const bool both_objects = a.is_object() && b.is_object() && !is_float(a) && !is_float(b);
    if (both_objects) {
      compare_objects(path, a, b);
    } else if (a.is_array() && b.is_array()) {
      compare_arrays(path, a, b);
    } else {
      ++result_.values;
      if (a.type() != b.type() || a != b) {
        result_.differences.push_back({path, value_of(a), value_of(b)});
      }
    }
  }

  JsonComparison result() { return std::move(result_); }

 private:
  void compare_objects(const std::string& path, const json& a, const json& b) {
    const std::string before = path.empty() ? "" : path + ".";
    for (const auto& [key, value] : a.items()) {
      const std::string inner = before + plain_name(key);
      if (b.contains(key))
        compare(inner, value, b[key]);
      else
        one_sided({inner, value_of(value), "absent"});
    }
    for (const auto& [key, value] : b.items()) {
      if (!a.contains(key)) one_sided({before + plain_name(key), "absent", value_of(value)});
    }
  }
  void compare_arrays(const std::string& path, const json& a, const json& b) {
    for (size_t i = 0; i < std::max(a.size(), b.size()); ++i) {
      const std::string inner = path + "[" + std::to_string(i) + "]";
      if (i >= b.size())
        one_sided({inner, value_of(a[i]), "absent"});
      else if (i >= a.size())
        one_sided({inner, "absent", value_of(b[i])});
      else
        compare(inner, a[i], b[i]);
    }
  }
  void one_sided(JsonDifference difference) {
    ++result_.values;
    result_.differences.push_back(std::move(difference));
  }

  JsonComparison result_;
};

}  // namespace

JsonComparison compare_json(const json& a, const json& b) {
  Walk walk;
  walk.compare("", a, b);
  return walk.result();
}

}  // namespace isoshard::reshard
