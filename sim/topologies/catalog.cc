// See catalog.h.
#include "sim/topologies/catalog.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <set>

#include "core/error.h"
#include "core/process_group.h"

namespace isoshard::sim {
namespace {

bool starts_with(const std::string& text, const std::string& start) {
  return text.compare(0, start.size(), start) == 0;
}

std::vector<Topology> select_one(const std::string& text) {
  std::vector<Topology> list;
  if (starts_with(text, "world<=")) {
    int world = 0;
    const char* const end = text.data() + text.size();
    const auto [stop, failure] = std::from_chars(text.data() + 7, end, world);
    if (failure == std::errc() && stop == end && world >= 1 && world <= 64) {
      return topologies_up_to(world);
    }
  } else if (text.find('=') != std::string::npos) {
    const TargetSpec spec = parse_target(text, "--topologies");
    if (spec.stage >= 0) {
      throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                            .what = "A topology is named with a stage; stages are drawn.",
                            .entry = quote(text),
                            .next = "leave stage= out"});
    }
    list.push_back(resolve(spec, Topology{}));
    check_topology(list.back());
    if (list.back().world() > 4096) {
      throw Error(ErrorInfo{.code = ErrorCode::kLimit,
                            .what = "So many ranks are not simulated.",
                            .entry = quote(text),
                            .expected = "up to 4096 ranks",
                            .found = std::to_string(list.back().world()) + " ranks"});
    }
  } else {
    for (const NamedTopology& entry : catalog()) {
      if (entry.name == text || starts_with(entry.name, text + ".")) {
        list.push_back(entry.topology);
      }
    }
  }
  if (!list.empty()) return list;
  throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                        .what = "No topologies are selected.",
                        .entry = quote(text),
                        .expected = "world<=N with N up to 64, dp=2,sp=4, or a name or family that "
                                    "`isoshard topologies` lists",
                        .next = "correct --topologies"});
}

}  // namespace

std::vector<NamedTopology> catalog() {
  std::vector<NamedTopology> all;
  for (const auto& family : {dense_topologies(), ulysses_topologies(), ulysses_tensor_topologies(),
                             expert_topologies(), pipeline_topologies(), awkward_topologies()}) {
    all.insert(all.end(), family.begin(), family.end());
  }
  return all;
}

std::vector<Topology> topologies_up_to(int world) {
  std::vector<Topology> list;
  for (int pp = 1; pp <= world; ++pp) {
    for (int dp = 1; dp * pp <= world; ++dp) {
      for (int sp = 1; sp * dp * pp <= world; ++sp) {
        for (int tp = 1; tp * sp * dp * pp <= world; ++tp) {
          for (int ep = 1; ep <= tp * sp * dp; ++ep) {
            if ((tp * sp * dp) % ep != 0) continue;
            list.push_back(
                {.data = dp, .sequence = sp, .tensor = tp, .expert = ep, .pipeline = pp});
          }
        }
      }
    }
  }
  return list;
}

std::vector<Topology> select_topologies(const std::string& text) {
  std::vector<Topology> list;
  std::set<std::array<int, 5>> known;
  const auto add = [&](const Topology& t) {
    if (known.insert({t.data, t.sequence, t.tensor, t.expert, t.pipeline}).second)
      list.push_back(t);
  };
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(' ', begin), text.size());
    if (end > begin) {
      std::ranges::for_each(select_one(text.substr(begin, end - begin)), add);
    }
    begin = end + 1;
  }
  if (list.empty()) return select_one(text);
  return list;
}

}  // namespace isoshard::sim
