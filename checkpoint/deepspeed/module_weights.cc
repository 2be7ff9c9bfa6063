// See module_weights.h.
#include "checkpoint/deepspeed/module_weights.h"

#include <algorithm>
#include <map>
#include <utility>

namespace isoshard::checkpoint {
namespace {

struct Expert {
  std::pair<std::string, int64_t> number;
  std::string name;
  Shape shape;
};

// Native experts, layer by layer in the order of `layers`, every layer's by their numbers.
std::vector<Expert> native_experts(const ShardedState& state, const std::vector<int>& files,
                                   const std::vector<std::string>& layers) {
  std::vector<Expert> result;
  for (int file : files) {
    const Fields f(state.document(file));
    for (const auto& [name, node] : f.named(f.root(), "expert file")) {
      if (const auto number = ExpertInfo::expert_number(name))
        result.push_back({*number, name, f.tensor(node, name).shape});
    }
  }
  const auto place = [&](const Expert& expert) {
    const auto layer = std::find(layers.begin(), layers.end(), expert.number.first);
    return std::pair(layer - layers.begin(), expert.number.second);
  };
  std::stable_sort(result.begin(), result.end(),
                   [&](const Expert& a, const Expert& b) { return place(a) < place(b); });
  return result;
}

// Every layer holds experts 0 … n−1, n a multiple of those of one rank.
void check_numbers(const ShardedState& state, const std::vector<Expert>& experts,
                   const std::map<std::string, int64_t>& local, size_t files) {
  std::map<std::string, std::vector<int64_t>> numbers;
  for (const Expert& expert : experts) {
    std::vector<int64_t>& list = numbers[expert.number.first];
    if (list.empty() || list.back() != expert.number.second) list.push_back(expert.number.second);
  }
  for (const auto& [layer, count] : local) {
    const std::vector<int64_t>& list = numbers[layer];
    for (size_t i = 0; i < list.size(); ++i) {
      if (list[i] != static_cast<int64_t>(i))
        refuse_missing_expert(state, layer + std::to_string(i), files);
    }
    const auto all = static_cast<int64_t>(list.size());
    if (all == 0 || all % count != 0)
      refuse_missing_expert(state, layer + std::to_string(all), files);
  }
}

}  // namespace

void list_parameters(ShardedState* state, const ModelStates& model, const ExpertInfo& experts,
                     const std::vector<int>& expert_files) {
  std::vector<std::string> layers;
  std::map<std::string, int64_t> local;  // native experts of rank 0, by layer
  const auto add = [&](const std::string& name, const Shape& shape) {
    state->parameters.push_back({.name = name, .shape = shape, .states = {}, .scalars = {}});
  };
  for (const NamedShapes& group : model.param_shapes) {
    for (const auto& [name, shape] : group) {
      if (const auto number = ExpertInfo::expert_number(name)) {
        int64_t& count = local[number->first];
        if (count == 0) layers.push_back(number->first);
        count = std::max(count, number->second + 1);
        continue;
      }
      Shape logical = shape;
      if (const ExpertLayer* layer = experts.layer_of(name); layer != nullptr && !shape.empty())
        logical[0] = layer->experts;
      add(name, logical);
    }
  }
  if (layers.empty()) return;
  const std::vector<Expert> native = native_experts(*state, expert_files, layers);
  check_numbers(*state, native, local, expert_files.size());
  for (const Expert& expert : native) add(expert.name, expert.shape);
}

void promote_copies(ShardedState* state) {
  for (ParameterState& parameter : state->parameters) {
    if (parameter.weight < 0) parameter.weight = std::exchange(parameter.model_copy, -1);
  }
}

}  // namespace isoshard::checkpoint
