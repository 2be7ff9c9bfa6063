// A small file that says under which names parameters go on: nothing is renamed without it.
//
//   {"experts": [{"from":
//   "(.+)\\.deepspeed_moe\\.experts\\.deepspeed_experts\\.{expert}\\.w1\\.weight",
//                 "to": "\\1.experts.w1"}, …],
//    "names":   [{"from": "(.+)\\.deepspeed_moe\\.gate\\.wg\\.weight",
//                 "to": "\\1.router.gate.weight", "also": ["\\1.gate.gate.weight"]}]}
//
// `from` is a regular expression (RE2) of the whole name, {expert} in it the expert's number, which
// counts as a group; `to` may use its groups. `also`: second names, tied to `to`.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace isoshard::checkpoint {

class NameMap {
 public:
  // `file` is named in messages. Throws Error(kUsage) for anything that is not such a file.
  NameMap(const std::string& json, const std::string& file);
  ~NameMap();

  struct Found {
    std::string name;
    std::vector<std::string> also;
    std::optional<int64_t> expert;
  };
  // Throws Error(kUsage) when two rules fit the name.
  std::optional<Found> find(const std::string& name);

  // Throws Error(kMismatch) unless every rule has fitted one of `names` and each of `unmatched` is
  // none: both are listed, each with what comes nearest on the other side.
  void check(const std::vector<std::string>& names,
             const std::vector<std::string>& unmatched) const;

 private:
  struct Rule;
  void check_name(const std::string& name) const;
  std::string file_;
  std::vector<std::unique_ptr<Rule>> rules_;
};

// How many characters must be put in, taken out or changed to make one text of the other.
int64_t edit_distance(const std::string& a, const std::string& b);

}  // namespace isoshard::checkpoint
