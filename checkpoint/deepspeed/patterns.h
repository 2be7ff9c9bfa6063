// Lists of name patterns as universal_checkpoint_info holds them: Python regular expressions,
// anchored at the start only. Nearly all are one escaped name ("^model\.norm\.weight$"), which are
// looked up and not searched.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace isoshard::checkpoint {

// "^a\.b$" for "a.b", as Python's re.escape writes it.
std::string exact_pattern(const std::string& name);

class PatternList {
 public:
  PatternList();
  ~PatternList();
  PatternList(PatternList&&) noexcept;
  PatternList& operator=(PatternList&&) noexcept;

  // Error(kUnsupported) for an expression that RE2 does not know.
  void add(const std::string& pattern, const std::string& file);

  // Numbers of the patterns that match, in the order of add().
  std::vector<int> matching(const std::string& name) const;
  // The first of them, or −1.
  int first(const std::string& name) const;
  const std::string& pattern(int number) const { return patterns_[static_cast<size_t>(number)]; }
  size_t size() const { return patterns_.size(); }

 private:
  struct Compiled;
  std::vector<std::string> patterns_;
  std::unordered_map<std::string, std::vector<int>> exact_;
  std::vector<Compiled> searched_;
};

}  // namespace isoshard::checkpoint
