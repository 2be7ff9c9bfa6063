// See patterns.h.
#include "checkpoint/deepspeed/patterns.h"

#include <re2/re2.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

constexpr const char* kEscaped = "()[]{}?*+-|^$\\.&~# \t\n\r\v\f";

// The name that "^name$" stands for, if every character of it stands for itself.
std::optional<std::string> literal_of(const std::string& pattern) {
  if (pattern.size() < 2 || pattern.front() != '^' || pattern.back() != '$') return std::nullopt;
  std::string name;
  for (size_t i = 1; i + 1 < pattern.size(); ++i) {
    const bool special = std::strchr(kEscaped, pattern[i]) != nullptr;
    if (pattern[i] == '\\') {
      if (i + 2 >= pattern.size() || std::strchr(kEscaped, pattern[i + 1]) == nullptr)
        return std::nullopt;
      name += pattern[++i];
    } else if (special) {
      return std::nullopt;
    } else {
      name += pattern[i];
    }
  }
  return name;
}

}  // namespace

struct PatternList::Compiled {
  int number;
  std::unique_ptr<re2::RE2> expression;
};

PatternList::PatternList() = default;
PatternList::~PatternList() = default;
PatternList::PatternList(PatternList&&) noexcept = default;
PatternList& PatternList::operator=(PatternList&&) noexcept = default;

std::string exact_pattern(const std::string& name) {
  std::string result = "^";
  for (char c : name) {
    if (c != '\0' && std::strchr(kEscaped, c) != nullptr) result += '\\';
    result += c;
  }
  return result + "$";
}

void PatternList::add(const std::string& pattern, const std::string& file) {
  const int number = static_cast<int>(patterns_.size());
  patterns_.push_back(pattern);
  if (const std::optional<std::string> name = literal_of(pattern)) {
    exact_[*name].push_back(number);
    return;
  }
  re2::RE2::Options options;
  options.set_log_errors(false);
  options.set_max_mem(1 << 20);
  auto expression = std::make_unique<re2::RE2>(pattern, options);
  if (!expression->ok()) {
    throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                          .what = "A name pattern cannot be understood: " + expression->error(),
                          .file = file,
                          .entry = "universal_checkpoint_info " + quote(pattern),
                          .expected = "a regular expression without look-around or references"});
  }
  searched_.push_back({number, std::move(expression)});
}

std::vector<int> PatternList::matching(const std::string& name) const {
  std::vector<int> result;
  if (const auto found = exact_.find(name); found != exact_.end()) result = found->second;
  for (const Compiled& compiled : searched_) {
    if (compiled.expression->Match(name, 0, name.size(), re2::RE2::ANCHOR_START, nullptr, 0))
      result.push_back(compiled.number);
  }
  std::sort(result.begin(), result.end());
  return result;
}

int PatternList::first(const std::string& name) const {
  const std::vector<int> numbers = matching(name);
  return numbers.empty() ? -1 : numbers.front();
}

}  // namespace isoshard::checkpoint
