// See whole_state.h.
#include "reference/whole_state.h"

#include <bit>
#include <cstdio>
#include <span>

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
  // values[k] is element `begin` + k of the parameter's shard.
  void put(const TrainedParameter& p, const std::string& state, int64_t begin,
           std::span<const float> values) {
    Tensor& tensor = tensors_[{p.name, state}];
    tensor.values.resize(static_cast<size_t>(numel(p.whole)));
    tensor.held.resize(tensor.values.size());
    for (size_t k = 0; k < values.size(); ++k) {
      const size_t element = static_cast<size_t>(whole_element(p, begin + static_cast<int64_t>(k)));
      float& whole = tensor.values[element];
      CHECK(!tensor.held[element] || bits(whole) == bits(values[k]),
            "ranks disagree on " + p.name + " " + state + " at " + std::to_string(element) + ": " +
                text(whole) + " and " + text(values[k]));
      whole = values[k];
      tensor.held[element] = true;
    }
  }
  WholeState finish() {
    WholeState state;
    for (auto& [key, tensor] : tensors_) {
      for (size_t i = 0; i < tensor.held.size(); ++i) {
        CHECK(tensor.held[i],
              "no rank holds " + key.first + " " + key.second + " at " + std::to_string(i));
      }
      state[key] = std::move(tensor.values);
    }
    return state;
  }

 private:
  struct Tensor {
    std::vector<float> values;
    std::vector<bool> held;
  };
  std::map<std::pair<std::string, std::string>, Tensor> tensors_;
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
        const auto put = [&](const std::string& name, const std::vector<float>& values) {
          assembly.put(p, name, piece.begin,
                       std::span(values).subspan(static_cast<size_t>(piece.at),
                                                 static_cast<size_t>(piece.count)));
        };
        put("fp32", group.master);
        for (const auto& [name, values] : group.states) put(name, values);
      }
    }
    for (const TrainedParameter& p : rank->parameters) {
      if (!p.values.empty()) assembly.put(p, "param", p.values_begin, p.values);
    }
  }
  return assembly.finish();
}

WholeState whole_state_of(const std::vector<TrainingState>& ranks) {
  std::vector<const TrainingState*> pointers;
  for (const TrainingState& rank : ranks) pointers.push_back(&rank);
  return whole_state(pointers);
}

namespace {

// Stage 3 keeps no copies of what has a master.
bool may_lack(const WholeState& other, const std::pair<std::string, std::string>& key) {
  return key.second == "param" && other.contains({key.first, "fp32"});
}

}  // namespace

std::string difference(const WholeState& a, const WholeState& b) {
  for (const auto& [key, values] : a) {
    const auto found = b.find(key);
    if (found == b.end()) {
      if (may_lack(b, key)) continue;
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
    if (a.count(key) == 0 && !may_lack(a, key)) return key.first + " is in one state only";
  }
  return "";
}

}  // namespace isoshard::reference
