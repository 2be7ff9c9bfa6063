// A regular expression over parameter names, matched anywhere in the name (RE2 syntax).
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "checkpoint/sharded_state.h"

namespace isoshard::checkpoint {

class NameFilter {
 public:
  explicit NameFilter(const std::string& pattern);  // empty: everything; Error(kUsage) if malformed
  ~NameFilter();
  bool matches(const std::string& name) const;

 private:
  struct Compiled;
  std::unique_ptr<Compiled> compiled_;
};

// What is said where --only selects nothing; `folder` may be empty.
[[noreturn]] void refuse_unmatched(const std::string& pattern, const std::string& folder);

// The state less the parameters and buffers that do not match; tied names stay together, and one
// that matches keeps them all. Group hyper-parameters stay. Names left out are added to `left_out`.
// Throws Error(kUsage) if nothing matches.
ShardedState select_names(ShardedState state, const std::string& pattern,
                          std::vector<std::string>* left_out);

}  // namespace isoshard::checkpoint
