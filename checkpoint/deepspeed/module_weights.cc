// See module_weights.h.
#include "checkpoint/deepspeed/module_weights.h"

#include <algorithm>
#include <map>
#include <utility>

#include "core/error.h"

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

// What follows an expert's number in its name.
std::string ending(const std::string& name, const std::pair<std::string, int64_t>& number) {
  return name.substr(name.find('.', number.first.size()));
}

// num_experts counts the experts of each layer, in order; native layers alone stand there.
void check_totals(const ShardedState& state, const ModelStates& model,
                  const std::vector<Expert>& experts, const std::vector<std::string>& layers) {
  std::map<std::string, int64_t> found;
  for (const Expert& expert : experts)
    found[expert.number.first] = std::max(found[expert.number.first], expert.number.second + 1);
  const Fields f(state.document(model.file));
  const std::optional<std::vector<NodeId>> counts = expert_counts(f);
  if (!counts || counts->size() != layers.size()) return;
  for (size_t i = 0; i < layers.size(); ++i) {
    const int64_t expected = f.integer((*counts)[i], "num_experts");
    if (found[layers[i]] < expected)
      refuse_missing_expert(state, layers[i] + std::to_string(found[layers[i]]), experts.size());
    if (found[layers[i]] > expected)
      f.fail("There are files of more experts than the layer has.", quote(layers[i]),
             std::to_string(expected), std::to_string(found[layers[i]]));
  }
}

}  // namespace

void list_parameters(ShardedState* state, const ModelStates& model, const ExpertInfo& experts,
                     const std::vector<int>& expert_files) {
  std::vector<std::string> layers;
  std::map<std::string, int64_t> local;  // native experts of rank 0, by layer
  std::map<std::string, Shape> kinds;    // and their shapes, by layer and what follows the number
  const auto add = [&](const std::string& name, const Shape& shape) {
    state->parameters.push_back({.name = name, .shape = shape, .states = {}, .scalars = {}});
  };
  for (const NamedShapes& group : model.param_shapes) {
    for (const auto& [name, shape] : group) {
      if (const auto number = ExpertInfo::expert_number(name)) {
        int64_t& count = local[number->first];
        if (count == 0) layers.push_back(number->first);
        count = std::max(count, number->second + 1);
        kinds[number->first + ending(name, *number)] = shape;
        continue;
      }
      const ExpertLayer* layer = experts.layer_of(name);
      if (layer == nullptr) {
        add(name, shape);
        continue;
      }
      add(name, experts.split_of(name, experts.shards_of(*layer, shape)).map.logical_shape);
    }
  }
  if (layers.empty()) return;
  const std::vector<Expert> native = native_experts(*state, expert_files, layers);
  check_numbers(*state, native, local, expert_files.size());
  check_totals(*state, model, native, layers);
  for (const Expert& expert : native) {
    const auto kind = kinds.find(expert.number.first + ending(expert.name, expert.number));
    if (kind == kinds.end() || kind->second != expert.shape)
      Fields(state->document(model.file))
          .fail("An expert's file holds another tensor than param_shapes names.",
                quote(expert.name), kind == kinds.end() ? "none" : to_string(kind->second),
                to_string(expert.shape));
    add(expert.name, expert.shape);
  }
}

void promote_copies(ShardedState* state, bool all) {
  for (ParameterState& parameter : state->parameters) {
    if (parameter.weight < 0) parameter.weight = std::exchange(parameter.model_copy, -1);
    if (parameter.weight >= 0 || !all) continue;
    throw Error(ErrorInfo{.code = ErrorCode::kIncomplete,
                          .what = "The model's files do not hold a parameter that they name.",
                          .file = state->folder,
                          .entry = quote(parameter.name),
                          .expected = "its values in module",
                          .found = "none",
                          .next = "take them from the masters: export --dtype fp32, or convert "
                                  "--to fp32"});
  }
}

}  // namespace isoshard::checkpoint
