// See hf_experts.h.
#include "checkpoint/deepspeed/hf_experts.h"

#include <algorithm>
#include <array>
#include <map>

#include "checkpoint/deepspeed/experts.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

// Of one family of models: the module that holds the layer, and AutoEP's three matrices.
struct Family {
  std::string module;  // last component of the layer's path in files; empty: as in the model
  std::array<std::string, 3> matrices;  // for w1 (gate), w2 (down), w3 (up)
};

const std::map<std::string, Family>& families() {
  static const std::map<std::string, Family> known = {
      {"mixtral", {"block_sparse_moe", {"w1", "w2", "w3"}}},
      {"qwen3_moe", {"", {"gate_proj", "down_proj", "up_proj"}}}};
  return known;
}

const Family& family_of(const ShardedState& state, const std::string& model_type) {
  const auto found = families().find(model_type);
  if (found != families().end()) return found->second;
  std::string names;
  for (const auto& [name, family] : families()) names += (names.empty() ? "" : ", ") + name;
  throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                        .what = "AutoEP stacks experts under names of its own (w1, w2, w3); how "
                                "this kind of model names them in its files is not known here.",
                        .file = state.folder,
                        .entry = "model_type of config.json",
                        .expected = names,
                        .found = model_type.empty() ? "none" : quote(model_type),
                        .safe = "nothing was written",
                        .next = "isoshard convert --to fp32 writes them under DeepSpeed's names"});
}

// Elements [begin, begin + count) of a leaf as a leaf of their own.
Leaf part_of(const Leaf& whole, int64_t begin, Shape shape, const std::string& name) {
  Leaf part = whole;
  part.name = name;
  part.fragments.clear();
  append_fragments(whole, begin, numel(shape), 0, &part.fragments);
  part.shape = std::move(shape);
  return part;
}

class Renaming {
 public:
  Renaming(ShardedState* state, const Family& family)
      : state_(*state),
        family_(family),
        model_(read_model_states(*state, state->model_files[0])),
        experts_(*state, model_) {}

  std::vector<std::string> run() {
    std::vector<ParameterState> parameters;
    std::vector<std::vector<int>> numbers;  // new numbers by old number
    for (const ParameterState& parameter : state_.parameters) {
      numbers.emplace_back();
      for (ParameterState& now : successors(parameter)) {
        numbers.back().push_back(static_cast<int>(parameters.size()));
        parameters.push_back(std::move(now));
      }
    }
    for (GroupState& group : state_.groups) {
      for (std::vector<int>* list : {&group.parameters, &group.flat_order}) {
        std::vector<int> renumbered;
        for (int old : *list) {
          const std::vector<int>& now = numbers[static_cast<size_t>(old)];
          renumbered.insert(renumbered.end(), now.begin(), now.end());
        }
        *list = std::move(renumbered);
      }
    }
    std::erase_if(state_.aliases, [&](const Alias& alias) {
      return experts_.layer_around(alias.name) != nullptr && !alias.recorded;
    });
    for (Alias& alias : state_.aliases) alias.target = file_name(alias.target);
    for (BufferState& buffer : state_.buffers) buffer.name = renamed(buffer.name, buffer.leaf);
    state_.set_parameters(std::move(parameters));
    return std::move(told_);
  }

 private:
  // The layer's path in files.
  std::string path_of(const ExpertLayer& layer) const {
    const size_t dot = layer.module_path.rfind('.');
    if (family_.module.empty() || dot == std::string::npos) return layer.module_path;
    return layer.module_path.substr(0, dot + 1) + family_.module;
  }

  // module_path.router.gate.weight → path.gate.weight; other names inside keep their ends.
  std::string file_name(const std::string& name) const {
    const ExpertLayer* layer = experts_.layer_around(name);
    if (layer == nullptr || layer->module_path.empty()) return name;
    std::string end = name.substr(layer->module_path.size());
    for (const std::string front : {".router.gate.", ".router."}) {
      if (end.starts_with(front)) {
        end = ".gate." + end.substr(front.size());
        break;
      }
    }
    return path_of(*layer) + end;
  }

  std::string renamed(const std::string& name, int leaf) {
    const std::string now = file_name(name);
    if (now == name) return name;
    told_.push_back(quote(now) + ": " + quote(name));
    if (leaf >= 0) state_.leaf(leaf).name = now;
    return now;
  }

  std::vector<ParameterState> successors(const ParameterState& parameter) {
    const ExpertLayer* layer = experts_.layer_of(parameter.name);
    if (layer == nullptr) {
      ParameterState same = parameter;
      same.name = renamed(parameter.name, parameter.weight);
      return {same};
    }
    const char matrix = parameter.name.back();  // of w1, w2, w3
    const std::string& file = family_.matrices[static_cast<size_t>(matrix - '1')];
    std::vector<ParameterState> result;
    for (int64_t id = 0; id < layer->experts; ++id) {
      ParameterState expert = parameter;
      expert.name = path_of(*layer) + ".experts." + std::to_string(id) + "." + file + ".weight";
      expert.shape = {parameter.shape[1], parameter.shape[2]};
      const int64_t size = numel(expert.shape);
      const auto part = [&](int leaf) {
        if (leaf < 0) return leaf;
        return state_.add_leaf(part_of(state_.leaf(leaf), id * size, expert.shape, expert.name));
      };
      expert.weight = part(parameter.weight);
      expert.model_copy = part(parameter.model_copy);
      expert.split = -1;
      expert.states.clear();
      expert.scalars.clear();
      told_.push_back(quote(expert.name) + ": " + quote(parameter.name) + "[" + std::to_string(id) +
                      "]");
      result.push_back(std::move(expert));
    }
    return result;
  }

  ShardedState& state_;
  const Family& family_;
  const ModelStates model_;
  const ExpertInfo experts_;
  std::vector<std::string> told_;
};

}  // namespace

void untie(ShardedState* state, const std::vector<std::string>& names) {
  std::vector<ParameterState> parameters = state->parameters;
  std::erase_if(state->aliases, [&](const Alias& alias) {
    const ParameterState* target = state->find_parameter(alias.target);
    if (target == nullptr || std::ranges::find(names, alias.name) == names.end()) return false;
    ParameterState own{.name = alias.name,
                       .shape = target->shape,
                       .model_dtype = target->model_dtype,
                       .states = {},
                       .scalars = {}};
    Leaf leaf = state->leaf(target->weight);
    leaf.name = alias.name;
    own.weight = state->add_leaf(std::move(leaf));
    parameters.push_back(std::move(own));
    return true;
  });
  state->set_parameters(std::move(parameters));
}

std::vector<std::string> name_experts_for_hf(ShardedState* state, const std::string& model_type) {
  return Renaming(state, family_of(*state, model_type)).run();
}

}  // namespace isoshard::checkpoint
