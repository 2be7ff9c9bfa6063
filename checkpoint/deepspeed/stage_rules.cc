// See stage_rules.h.
#include "checkpoint/deepspeed/stage_rules.h"

#include <algorithm>

#include "checkpoint/deepspeed/pipeline.h"
#include "core/pipeline_rules.h"

namespace isoshard::checkpoint {
namespace {

// Elements of each parameter on a tensor-parallel rank of the source, or of the target.
using Counts = std::vector<int64_t>;

Counts source_counts(const ShardedState& state) {
  Counts result;
  for (const ParameterState& parameter : state.parameters)
    result.push_back(parameter.split < 0
                         ? numel(parameter.shape)
                         : numel(state.split_of(parameter).map.ranks[0].shard_shape));
  return result;
}

Counts target_counts(const ShardedState& state, const std::vector<AffineMap>& maps) {
  Counts result;
  for (size_t i = 0; i < state.parameters.size(); ++i)
    result.push_back(
        numel(maps.empty() ? state.parameters[i].shape : maps[i].ranks[0].shard_shape));
  return result;
}

// Elements of each layer, those of a tied module in each layer that uses it. DeepSpeed counts what
// is trained when the model is built: what was frozen later counts too.
std::vector<int64_t> weights(const ShardedState& state, int layers, const TiedUses& uses,
                             bool frozen, const Counts& counts) {
  std::vector<int64_t> result(static_cast<size_t>(layers), 0);
  for (size_t i = 0; i < counts.size(); ++i) {
    const ParameterState& parameter = state.parameters[i];
    if (parameter.group < 0 && !frozen) continue;
    const int64_t count = counts[i];
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
                                   const std::string& method, const std::vector<AffineMap>& maps) {
  std::vector<StageRule> result;
  if (method.empty() || method == "uniform") {
    const auto parts = [layers](int stages) { return uniform_parts(layers, stages); };
    result.push_back({"uniform", parts, parts});
  }
  if (layers > kMostInferred) return result;
  const auto balanced = [](std::vector<int64_t> of) {
    return [of = std::move(of)](int stages) { return balanced_parts(of, stages); };
  };
  if (method.empty() || method == "parameters") {
    const Counts source = source_counts(state), target = target_counts(state, maps);
    const auto by_weight = [&](const std::string& name, bool frozen) {
      result.push_back({name, balanced(weights(state, layers, uses, frozen, source)),
                        balanced(weights(state, layers, uses, frozen, target))});
    };
    by_weight("parameters", false);
    const bool some = std::ranges::any_of(
        state.parameters, [](const ParameterState& parameter) { return parameter.group < 0; });
    if (some) by_weight("parameters, frozen ones too", true);
  }
  if (method.empty()) {
    for (std::vector<int64_t>& binary : classes(state, layers))
      result.push_back({"type:REGEX", balanced(binary), balanced(binary)});
  }
  return result;
}

}  // namespace isoshard::checkpoint
