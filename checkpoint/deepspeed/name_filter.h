// A regular expression over parameter names, matched anywhere in the name (RE2 syntax).
#pragma once

#include <memory>
#include <string>

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

}  // namespace isoshard::checkpoint
