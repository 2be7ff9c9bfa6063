// See whole_state.h.
#include "reference/whole_state.h"

#include <bit>
#include <cstdio>

#include "core/check.h"

namespace isoshard::reference {
namespace {

uint32_t bits(float value) { return std::bit_cast<uint32_t>(value); }

std::string text(float value) {
  char buffer[64];
  std::snprintf(buffer, sizeof buffer, "%a (0x%08x)", static_cast<double>(value), bits(value));
  return buffer;
}

class Assembly {
 public:
  void put(const TrainedParameter& p, const std::string& state, int64_t at, float value) {
    const std::pair<std::string, std::string> key{p.name, state};
    std::vector<float>& whole = values_[key];
    std::vector<bool>& held = held_[key];
    whole.resize(static_cast<size_t>(numel(p.whole)));
    held.resize(whole.size());
    const size_t element = static_cast<size_t>(whole_element(p, at));
    CHECK(!held[element] || bits(whole[element]) == bits(value),
          "ranks disagree on " + p.name + " " + state + " at " + std::to_string(element) + ": " +
              text(whole[element]) + " and " + text(value));
    whole[element] = value;
    held[element] = true;
  }
  WholeState finish() {
    for (const auto& [key, held] : held_) {
      for (size_t i = 0; i < held.size(); ++i) {
        CHECK(held[i],
              "no rank holds " + key.first + " " + key.second + " at " + std::to_string(i));
      }
    }
    return values_;
  }

 private:
  WholeState values_;
  std::map<std::pair<std::string, std::string>, std::vector<bool>> held_;
};

}  // namespace

int64_t whole_element(const TrainedParameter& p, int64_t at) {
  if (p.split_axis < 0) return at;
  int64_t inner = 1;
  for (size_t axis = static_cast<size_t>(p.split_axis) + 1; axis < p.whole.size(); ++axis) {
    inner *= p.whole[axis];
  }
  const size_t axis = static_cast<size_t>(p.split_axis);
  const int64_t row = inner * p.shape[axis];
  return at / row * (inner * p.whole[axis]) + p.split_begin * inner + at % row;
}

WholeState whole_state(const std::vector<const TrainingState*>& ranks) {
  Assembly assembly;
  for (const TrainingState* rank : ranks) {
    for (const TrainedGroup& group : rank->groups) {
      for (const BufferPiece& piece : group.pieces) {
        const TrainedParameter& p = rank->parameters[static_cast<size_t>(piece.parameter)];
        for (int64_t i = 0; i < piece.count; ++i) {
          const size_t at = static_cast<size_t>(piece.at + i);
          assembly.put(p, "fp32", piece.begin + i, group.master[at]);
          for (const auto& [name, values] : group.states) {
            assembly.put(p, name, piece.begin + i, values[at]);
          }
        }
      }
    }
    for (const TrainedParameter& p : rank->parameters) {
      for (size_t i = 0; i < p.values.size(); ++i) {
        assembly.put(p, "param", static_cast<int64_t>(i), p.values[i]);
      }
    }
  }
  return assembly.finish();
}

std::string difference(const WholeState& a, const WholeState& b) {
  for (const auto& [key, values] : a) {
    const auto found = b.find(key);
    if (found == b.end()) {
      if (key.second == "param") continue;  // stage 3 keeps no copies
      return key.first + " " + key.second + " is in one state only";
    }
    if (values.size() != found->second.size()) return key.first + ": other sizes";
    for (size_t i = 0; i < values.size(); ++i) {
      if (bits(values[i]) == bits(found->second[i])) continue;
      return key.first + " " + key.second + " at " + std::to_string(i) + ": " + text(values[i]) +
             " and " + text(found->second[i]);
    }
  }
  for (const auto& [key, values] : b) {
    if (a.count(key) == 0 && key.second != "param") return key.first + " is in one state only";
  }
  return "";
}

}  // namespace isoshard::reference
