// See stage_rules.h.
#include "checkpoint/deepspeed/stage_rules.h"

#include <algorithm>

#include "checkpoint/deepspeed/pipeline.h"
#include "core/pipeline_rules.h"

namespace isoshard::checkpoint {
namespace {

// Elements of each layer, those of a tied module in each layer that uses it. DeepSpeed counts what
// is trained when the model is built: what was frozen later counts too.
std::vector<int64_t> weights(const ShardedState& state, int layers, const TiedUses& uses,
                             bool frozen) {
  std::vector<int64_t> result(static_cast<size_t>(layers), 0);
  for (const ParameterState& parameter : state.parameters) {
    if (parameter.group < 0 && !frozen) continue;
    const int64_t count = numel(parameter.shape);
    if (const int layer = layer_in_name(parameter.name); layer != kNoLayer && layer < layers)
      result[static_cast<size_t>(layer)] += count;
    const auto tied = uses.find(tied_key(parameter.name));
    if (tied == uses.end()) continue;
    for (int layer : tied->second) result[static_cast<size_t>(layer)] += count;
  }
  return result;
}

// Layers of one class, by the names and shapes in them, as "type:REGEX" may name it.
std::vector<std::vector<int64_t>> classes(const ShardedState& state, int layers) {
  std::map<int, std::string> signatures;
  for (const ParameterState& parameter : state.parameters) {
    if (const int layer = layer_in_name(parameter.name); layer != kNoLayer && layer < layers)
      signatures[layer] +=
          parameter.name.substr(parameter.name.find('.')) + " " + to_string(parameter.shape) + "\n";
  }
  std::map<std::string, std::vector<int64_t>> by_class;
  for (const auto& [layer, signature] : signatures) {
    std::vector<int64_t>& binary = by_class[signature];
    binary.resize(static_cast<size_t>(layers), 0);
    binary[static_cast<size_t>(layer)] = 1;
  }
  std::vector<std::vector<int64_t>> result;
  for (auto& [signature, binary] : by_class) {
    if (std::ranges::count(binary, 1) > 1) result.push_back(std::move(binary));
  }
  return result;
}

}  // namespace

std::vector<StageRule> stage_rules(const ShardedState& state, int layers, const TiedUses& uses,
                                   const std::string& method) {
  std::vector<StageRule> result;
  if (method.empty() || method == "uniform")
    result.push_back({"uniform", [layers](int stages) { return uniform_parts(layers, stages); }});
  if (layers > kMostInferred) return result;
  const auto balanced = [&](const std::string& name, std::vector<int64_t> of) {
    result.push_back(
        {name, [of = std::move(of)](int stages) { return balanced_parts(of, stages); }});
  };
  if (method.empty() || method == "parameters") {
    balanced("parameters", weights(state, layers, uses, /*frozen=*/false));
    const bool some = std::ranges::any_of(
        state.parameters, [](const ParameterState& parameter) { return parameter.group < 0; });
    if (some)
      balanced("parameters, frozen ones too", weights(state, layers, uses, /*frozen=*/true));
  }
  if (method.empty()) {
    for (std::vector<int64_t>& binary : classes(state, layers))
      balanced("type:REGEX", std::move(binary));
  }
  return result;
}

}  // namespace isoshard::checkpoint
