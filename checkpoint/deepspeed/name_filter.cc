// RE2 runs in time linear in the name, whatever the pattern.
#include "checkpoint/deepspeed/name_filter.h"

#include <re2/re2.h>

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

}  // namespace isoshard::checkpoint
