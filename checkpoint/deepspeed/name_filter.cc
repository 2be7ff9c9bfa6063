// RE2 runs in time linear in the name, whatever the pattern.
#include "checkpoint/deepspeed/name_filter.h"

#include <re2/re2.h>

#include <set>

#include "core/error.h"

namespace isoshard::checkpoint {

struct NameFilter::Compiled {
  re2::RE2 expression;
};

NameFilter::NameFilter(const std::string& pattern) {
  if (pattern.empty()) return;
  re2::RE2::Options options;
  options.set_log_errors(false);
  compiled_ = std::unique_ptr<Compiled>(new Compiled{re2::RE2(pattern, options)});
  if (!compiled_->expression.ok()) {
    throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                          .what = "A regular expression cannot be read.",
                          .entry = quote(pattern),
                          .found = compiled_->expression.error(),
                          .next = "use RE2 syntax"});
  }
}

NameFilter::~NameFilter() = default;

bool NameFilter::matches(const std::string& name) const {
  return compiled_ == nullptr || re2::RE2::PartialMatch(name, compiled_->expression);
}

void refuse_unmatched(const std::string& pattern, const std::string& folder) {
  throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                        .what = "No parameter or buffer has a name that --only matches.",
                        .file = folder,
                        .entry = quote(pattern),
                        .next = "isoshard inspect --parameters lists the names"});
}

ShardedState select_names(ShardedState state, const std::string& pattern,
                          std::vector<std::string>* left_out) {
  const NameFilter filter(pattern);
  std::set<std::string> kept;
  for (const Alias& alias : state.aliases) {
    if (filter.matches(alias.name)) kept.insert(alias.target);
  }
  const auto is_kept = [&](const std::string& name) {
    if (filter.matches(name) || kept.contains(name)) return true;
    left_out->push_back(name);
    return false;
  };
  std::vector<int> numbers;  // by old number; −1: left out
  std::vector<ParameterState> parameters;
  for (const ParameterState& parameter : state.parameters) {
    const bool keep = is_kept(parameter.name);
    numbers.push_back(keep ? static_cast<int>(parameters.size()) : -1);
    if (keep) parameters.push_back(parameter);
  }
  std::erase_if(state.buffers, [&](const BufferState& buffer) { return !is_kept(buffer.name); });
  if (parameters.empty() && state.buffers.empty()) refuse_unmatched(pattern, state.folder);
  for (GroupState& group : state.groups) {
    for (std::vector<int>* list : {&group.parameters, &group.flat_order}) {
      for (int& number : *list) number = numbers[static_cast<size_t>(number)];
      std::erase(*list, -1);
    }
  }
  state.set_parameters(std::move(parameters));
  std::erase_if(state.aliases, [&](const Alias& alias) {
    if (state.find_parameter(alias.target) != nullptr) return false;
    left_out->push_back(alias.name);
    return true;
  });
  std::set<std::string> names;
  for (const ParameterState& parameter : state.parameters) names.insert(parameter.name);
  for (const BufferState& buffer : state.buffers) names.insert(buffer.name);
  for (std::vector<std::pair<int, int>>* pairs : {&state.copies, &state.replicas}) {
    std::erase_if(*pairs,
                  [&](const auto& pair) { return !names.contains(state.leaf(pair.second).name); });
  }
  state.partial = !left_out->empty();
  return state;
}

}  // namespace isoshard::checkpoint
