// See name_map.h.
#include "checkpoint/deepspeed/name_map.h"

#include <re2/re2.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <nlohmann/json.hpp>
#include <numeric>

#include "checkpoint/shallow_json.h"
#include "core/error.h"
#include "core/utf8.h"

namespace isoshard::checkpoint {

struct NameMap::Rule {
  std::string from, to;
  std::vector<std::string> also;
  std::unique_ptr<re2::RE2> pattern;
  int expert_group = 0;  // 0: none
  bool used = false;
};

namespace {

constexpr const char* kMark = "{expert}";
constexpr const char* kGroup = "(?P<expert>[0-9]{1,6})";

[[noreturn]] void refuse(const std::string& file, const std::string& entry,
                         const std::string& expected, const std::string& found) {
  throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                        .what = "The file of names cannot be used.",
                        .file = file,
                        .entry = entry,
                        .expected = expected,
                        .found = found,
                        .safe = "nothing was written",
                        .next = "traces/names/ has an example"});
}

std::string shown(const std::string& text) {
  constexpr size_t kMost = 200;
  return text.size() <= kMost ? quote(text) : quote(text.substr(0, kMost)) + "…";
}

// A pattern as people read it, to measure how near a name comes to it.
std::string plain(const std::string& pattern) {
  std::string text;
  for (char c : pattern) {
    if (text.size() < 256 && c != '\\' && c != '(' && c != ')' && c != '+' && c != '?' && c != '*')
      text += c;
  }
  return text;
}

std::string nearest(const std::string& to, const std::vector<std::string>& among) {
  std::string best;
  int64_t least = -1;
  for (const std::string& candidate : among) {
    const int64_t distance = edit_distance(plain(to), plain(candidate));
    if (least >= 0 && distance >= least) continue;
    least = distance;
    best = candidate;
  }
  return best.empty() ? "nothing comes near" : "nearest: " + shown(best);
}

std::string listed(const std::vector<std::string>& items, const std::vector<std::string>& others) {
  constexpr size_t kShown = 8;
  std::string text;
  for (size_t i = 0; i < items.size() && i < kShown; ++i)
    text += (i == 0 ? "" : "; ") + shown(items[i]) + " (" + nearest(items[i], others) + ")";
  if (items.size() > kShown) text += "; and " + std::to_string(items.size() - kShown) + " more";
  return text;
}

std::string text_of(const nlohmann::json& rule, const char* key, const std::string& file) {
  if (!rule.is_object() || !rule.contains(key) || !rule[key].is_string())
    refuse(file, key, "a text in each rule", rule.dump().substr(0, 200));
  return rule[key].get<std::string>();
}

}  // namespace

int64_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<int64_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), 0);
  for (size_t i = 0; i < a.size(); ++i) {
    int64_t diagonal = std::exchange(row[0], static_cast<int64_t>(i) + 1);
    for (size_t j = 0; j < b.size(); ++j) {
      const int64_t change = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = std::exchange(row[j + 1], std::min({row[j] + 1, row[j + 1] + 1, change}));
    }
  }
  return row.back();
}

NameMap::NameMap(const std::string& json, const std::string& file) : file_(file) {
  const nlohmann::json parsed = parse_shallow_json(json, file);
  if (!parsed.is_object()) refuse(file, "", "a JSON object", "something else");
  for (const auto& [key, value] : parsed.items()) {
    if (key != "experts" && key != "names" && key != "note")
      refuse(file, quote(key), "experts, names, note", quote(key));
  }
  for (const char* kind : {"experts", "names"}) {
    const nlohmann::json list = parsed.value(kind, nlohmann::json::array());
    if (!list.is_array()) refuse(file, kind, "a list of rules", list.type_name());
    for (const nlohmann::json& item : list) {
      auto rule = std::make_unique<Rule>();
      rule->from = text_of(item, "from", file);
      rule->to = text_of(item, "to", file);
      const nlohmann::json also = item.value("also", nlohmann::json::array());
      const bool expert = kind == std::string("experts");
      if (!also.is_array() || also.size() > (expert ? 0U : 1U))
        refuse(file, "also of " + shown(rule->from),
               expert ? "none in a rule for experts" : "a list of at most one name",
               also.dump().substr(0, 200));
      for (const nlohmann::json& name : also)
        rule->also.push_back(name.is_string() ? name.get<std::string>() : "");
      std::string pattern = rule->from;
      const size_t mark = pattern.find(kMark);
      if (expert != (mark != std::string::npos))
        refuse(file, shown(rule->from),
               expert ? "{expert} where the number stands" : "no {expert} outside of experts",
               expert ? "none" : "one");
      if (expert) pattern.replace(mark, std::char_traits<char>::length(kMark), kGroup);
      rule->pattern = std::make_unique<re2::RE2>(pattern, re2::RE2::Quiet);
      std::string why = rule->pattern->error().substr(0, 200);
      if (rule->from.find("<expert>") != std::string::npos)
        why = "a group of its own that is called expert";
      if (rule->pattern->ok() && rule->pattern->NumberOfCapturingGroups() > 9)
        why = "more than nine groups";
      if (rule->pattern->ok()) {
        rule->pattern->CheckRewriteString(rule->to, &why);
        for (const std::string& also : rule->also)
          if (why.empty()) rule->pattern->CheckRewriteString(also, &why);
      }
      if (!why.empty()) refuse(file, shown(rule->from), "a regular expression (RE2)", why);
      const auto groups = rule->pattern->NamedCapturingGroups();
      if (const auto found = groups.find("expert"); found != groups.end())
        rule->expert_group = found->second;
      rules_.push_back(std::move(rule));
    }
  }
  if (rules_.empty()) refuse(file, "experts, names", "at least one rule", "none");
}

NameMap::~NameMap() = default;

void NameMap::check_name(const std::string& name) const {
  const std::string why = why_unsafe_name(name);
  if (why.empty() && name.find('/') == std::string::npos) return;
  refuse(file_, shown(name), "a name of a parameter", why.empty() ? "one with a '/'" : why);
}

std::optional<NameMap::Found> NameMap::find(const std::string& name) {
  std::optional<Found> result;
  std::string first;
  for (const std::unique_ptr<Rule>& rule : rules_) {
    std::array<re2::StringPiece, 10> groups;
    const int count = std::min(10, rule->pattern->NumberOfCapturingGroups() + 1);
    if (!rule->pattern->Match(name, 0, name.size(), re2::RE2::ANCHOR_BOTH, groups.data(), count))
      continue;
    if (result)
      refuse(file_, quote(name), "one rule that fits", shown(first) + " and " + shown(rule->from));
    rule->used = true;
    first = rule->from;
    result.emplace();
    const auto rewritten = [&](const std::string& text) {
      std::string out;
      rule->pattern->Rewrite(&out, text, groups.data(), count);
      return out;
    };
    result->name = rewritten(rule->to);
    for (const std::string& also : rule->also) result->also.push_back(rewritten(also));
    for (const std::string& each : result->also) check_name(each);
    check_name(result->name);
    if (rule->expert_group > 0) {
      const re2::StringPiece& digits = groups.at(static_cast<size_t>(rule->expert_group));
      int64_t number = -1;
      std::from_chars(digits.data(), digits.data() + digits.size(), number);
      if (number < 0) refuse(file_, shown(rule->from), "a number for {expert}", "none");
      result->expert = number;
    }
  }
  return result;
}

void NameMap::check(const std::vector<std::string>& names,
                    const std::vector<std::string>& unmatched) const {
  std::vector<std::string> idle, patterns;
  for (const std::unique_ptr<Rule>& rule : rules_) {
    patterns.push_back(rule->from);
    if (!rule->used) idle.push_back(rule->from);
  }
  if (idle.empty() && unmatched.empty()) return;
  throw Error(ErrorInfo{
      .code = ErrorCode::kMismatch,
      .what = "The names of the checkpoint and those of the map do not meet.",
      .file = file_,
      .expected = idle.empty() ? "a rule for every expert"
                               : "a name for each rule; for none of " + listed(idle, names),
      .found = unmatched.empty() ? "all experts have a rule"
                                 : "no rule for " + listed(unmatched, patterns),
      .safe = "nothing was written",
      .next = "write the missing rules into the map; nothing is renamed without one"});
}

}  // namespace isoshard::checkpoint
