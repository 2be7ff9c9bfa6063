// See expert_tensors.h.
#include "checkpoint/deepspeed/expert_tensors.h"

#include <algorithm>
#include <set>

#include "checkpoint/deepspeed/names.h"

namespace isoshard::checkpoint {

ExpertTensors::ExpertTensors(const ShardedState& state, const ModelStates& model,
                             const ExpertInfo& experts, std::vector<int> files)
    : state_(state),
      model_(model),
      experts_(experts),
      fields_(state.document(model.file)),
      files_(files.size()) {
  read(std::move(files));
  check_native();
  check_module();
}

// In the order of the layers' numbers, then of the experts'.
void ExpertTensors::read(std::vector<int> files) {
  const auto layer_of = [&](int file) {
    const std::string& name = state_.files[static_cast<size_t>(file)].relative;
    return layer_in_file_name(name).value_or(0);
  };
  std::ranges::stable_sort(files, {}, layer_of);
  std::map<std::string, int> names;
  for (int file : files) {
    const Fields f(state_.document(file));
    for (const auto& [name, node] : f.named(f.root(), "expert file")) {
      const TensorView view = f.tensor(node, name);
      if (const auto [known, fresh] = names.emplace(name, file); !fresh)
        refuse_second_file(state_, known->second, file);
      ModuleEntry entry{.leaf = file_leaf(f.document(), file, view, name, "param"),
                        .local_name = name,
                        .expert = true,
                        .replaced = experts_.autoep()};
      if (experts_.autoep()) {
        slices_.emplace(name, std::move(entry));
        continue;
      }
      const auto number = ExpertInfo::expert_number(name);
      if (!number)
        f.fail("An expert file holds what is no expert.", quote(name), "a name of an expert",
               "another");
      auto layer = std::ranges::find(layers_, number->first, &NativeLayer::path);
      if (layer == layers_.end())
        layer = layers_.insert(layers_.end(), {.path = number->first, .experts = {}});
      layer->experts[number->second].push_back(std::move(entry));
    }
  }
}

// Every layer has files, numbered as num_experts counts them; its experts are 0 … n−1 with the same
// tensors.
void ExpertTensors::check_native() const {
  if (experts_.autoep()) return;
  const std::optional<std::vector<NodeId>> counts = expert_counts(fields_);
  const size_t count = counts ? counts->size() : layers_.size();
  if (count != layers_.size())
    state_.refuse(count > layers_.size() ? ErrorCode::kIncomplete : ErrorCode::kMismatch,
                  "The folder does not hold the files of the experts of every layer (DeepSpeed: "
                  "FileNotFoundError).",
                  "layer_*_expert_*_mp_rank_00_model_states.pt", std::to_string(count) + " layers",
                  std::to_string(layers_.size()),
                  "bring the missing files from the node that wrote them");
  for (size_t i = 0; i < layers_.size(); ++i) {
    const NativeLayer& layer = layers_[i];
    const int64_t found = layer.experts.rbegin()->first + 1;
    const int64_t expected = counts ? fields_.integer((*counts)[i], "num_experts") : found;
    for (int64_t id = 0; id < std::max(found, expected); ++id) {
      if (!layer.experts.contains(id))
        refuse_missing_expert(state_, layer.path + std::to_string(id), files_);
      if (id >= expected)
        fields_.fail("There are files of more experts than the layer has.", quote(layer.path),
                     std::to_string(expected), std::to_string(found));
      if (shapes_of(layer, id) != shapes_of(layer, 0))
        state_.refuse(ErrorCode::kMismatch, "Experts of one layer have different tensors.",
                      quote(layer.path + std::to_string(id)), shapes_of(layer, 0),
                      shapes_of(layer, id), "look whether the file is of another save");
    }
  }
}

// "0.weight [12, 8] float32 …", in the file's order.
std::string ExpertTensors::shapes_of(const NativeLayer& layer, int64_t id) {
  std::string text;
  for (const ModuleEntry& entry : layer.experts.at(id)) {
    text += entry.local_name.substr(layer.path.size() + std::to_string(id).size() + 1) + " " +
            to_string(entry.leaf.shape) + " " + name(entry.leaf.dtype) + " ";
  }
  return text;
}

// Experts lie in files of their own, and no file holds what no layer has.
void ExpertTensors::check_module() const {
  for (const auto& [name, node] : model_.module) {
    if (experts_.is_expert(name))
      fields_.fail("The module holds an expert, which lies in a file of its own.", quote(name),
                   "layer_*_expert_* files alone", "in the model file too");
  }
  std::set<std::string> known;
  for (const ExpertLayer& layer : experts_.layers()) {
    for (const char* stack : {".w1.", ".w2.", ".w3."}) {
      for (int64_t id = 0; id < layer.experts; ++id)
        known.insert(layer.prefix + stack + std::to_string(id));
    }
  }
  for (const auto& [name, entry] : slices_) {
    if (!known.contains(name))
      state_.refuse(ErrorCode::kMismatch, "An expert file holds what no layer of experts has.",
                    quote(name), "experts of ds_autoep_layers alone", "another",
                    "look whether the file is of another save");
  }
}

std::vector<ExpertBlock> ExpertTensors::blocks_of(int rank, int ranks) const {
  std::vector<ExpertBlock> blocks;
  for (const ExpertLayer& layer : experts_.layers()) blocks.push_back(stacks_of(layer, rank));
  for (const NativeLayer& layer : layers_) {
    // The layer's gate is registered before its experts (deepspeed/moe/sharded_moe.py, MOELayer).
    ExpertBlock block{.after = layer.path.substr(0, layer.path.find("experts.deepspeed_experts.")),
                      .entries = {}};
    const auto local = static_cast<int64_t>(layer.experts.size()) / ranks;
    for (int64_t id = rank * local; id < (rank + 1) * local; ++id) {
      for (ModuleEntry entry : layer.experts.at(id)) {
        entry.local_name = ExpertInfo::global_name(entry.leaf.name, -rank, local);
        block.entries.push_back(std::move(entry));
      }
    }
    blocks.push_back(std::move(block));
  }
  return blocks;
}

// A rank's w1, w2, w3 of a layer: [local experts, …], from one file an expert.
ExpertBlock ExpertTensors::stacks_of(const ExpertLayer& layer, int rank) const {
  ExpertBlock block{.after = router_of(layer), .entries = {}};
  for (const char* stack : {".w1", ".w2", ".w3"}) {
    ModuleEntry whole{
        .leaf = {}, .local_name = layer.prefix + stack, .expert = true, .replaced = true};
    int64_t count = 0;
    for (int64_t id : layer.placement.at(static_cast<size_t>(rank))) {
      const std::string name = whole.local_name + "." + std::to_string(id);
      const auto found = slices_.find(name);
      if (found == slices_.end()) refuse_missing_expert(state_, name, files_);
      const Leaf& slice = found->second.leaf;
      if (count++ == 0) {
        whole.leaf = slice;
        whole.leaf.name = whole.local_name;
        continue;
      }
      if (slice.shape != whole.leaf.shape || slice.dtype != whole.leaf.dtype)
        state_.refuse(ErrorCode::kMismatch, "Experts of one layer have different shapes or dtypes.",
                      quote(name),
                      to_string(whole.leaf.shape) + " " + isoshard::name(whole.leaf.dtype),
                      to_string(slice.shape) + " " + isoshard::name(slice.dtype),
                      "look whether the file is of another save");
      append_fragments(slice, 0, slice.size_elements(), (count - 1) * slice.size_elements(),
                       &whole.leaf.fragments);
    }
    whole.leaf.shape.insert(whole.leaf.shape.begin(), count);
    block.entries.push_back(std::move(whole));
  }
  return block;
}

std::string ExpertTensors::local_name(const std::string& name, int rank, int ranks) const {
  const auto number = ExpertInfo::expert_number(name);
  if (!number) return name;
  const auto layer = std::ranges::find(layers_, number->first, &NativeLayer::path);
  return ExpertInfo::global_name(name, -rank, static_cast<int64_t>(layer->experts.size()) / ranks);
}

}  // namespace isoshard::checkpoint
