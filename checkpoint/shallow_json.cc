// See shallow_json.h.
#include "checkpoint/shallow_json.h"

#include <set>
#include <vector>

#include "core/error.h"

namespace isoshard::checkpoint {

nlohmann::json parse_shallow_json(const std::string& text, const std::string& file) {
  constexpr int kMostLevels = 64;
  std::vector<std::set<std::string>> keys;
  std::string why;
  using Event = nlohmann::json::parse_event_t;
  const auto look = [&](int depth, Event event, nlohmann::json& value) {
    if (depth > kMostLevels) why = "nested deeper than " + std::to_string(kMostLevels) + " levels";
    if (!why.empty()) return false;
    if (event == Event::object_start) keys.emplace_back();
    if (event == Event::object_end) keys.pop_back();
    if (event == Event::key && !keys.back().insert(value.get<std::string>()).second)
      why = "the key " + quote(value.get<std::string>().substr(0, 100)) + " twice in one object";
    return true;
  };
  nlohmann::json parsed = nlohmann::json::parse(text, look, false);
  if (why.empty() && parsed.is_discarded()) why = "no JSON";
  if (why.empty()) return parsed;
  throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                        .what = "The JSON file cannot be used.",
                        .file = file,
                        .expected = "JSON with each key once",
                        .found = why,
                        .safe = "nothing was written",
                        .next = "mend the file"});
}

}  // namespace isoshard::checkpoint
