// See expert_source.h. Keys: deepspeed/runtime/engine.py, _save_moe_checkpoint;
// fp16/unfused_optimizer.py, state_dict (DeepSpeed 0.19.8).
#include "properties/expert_source.h"

#include <cstdio>

#include "properties/hand_file.h"

namespace isoshard::properties {
namespace {

using checkpoint::FileBlueprint;
using checkpoint::NodeId;
using Entries = std::vector<std::pair<std::string, NodeId>>;

class ExpertFileWriter : public HandFile {
 public:
  ExpertFileWriter(const Model& model, const Job& job) : model_(model), job_(job) {}

  FileBlueprint model_file() {
    std::vector<NodeId> module, counts;
    for (size_t i = 0; i < model_.parameters.size(); ++i) {
      if (is_expert(model_.parameters[i].name)) continue;
      module.push_back(pickle().string(model_.parameters[i].name));
      module.push_back(module_tensor(i));
    }
    for (int count : model_.experts) counts.push_back(pickle().integer(count));
    const Entries root = {
        {"module", pickle().ordered_dict(std::move(module))},
        {"buffer_names", pickle().list({})},
        {"optimizer", optimizer(0)},
        {"param_shapes", pickle().none()},
        {"frozen_param_shapes", pickle().none()},
        {"shared_params", pickle().none()},
        {"frozen_param_fragments", pickle().none()},
        {"lr_scheduler", pickle().none()},
        {"data_sampler", pickle().none()},
        {"random_ltd", pickle().none()},
        {"skipped_steps", pickle().integer(0)},
        {"global_steps", pickle().integer(5)},
        {"global_samples", pickle().integer(320)},
        {"dp_world_size", pickle().integer(job_.ranks())},
        {"mp_world_size", pickle().integer(1)},
        {"checkpoint_parallel_dimensions",
         builder_.dict({{"pp_degree", pickle().integer(1)}, {"tp_degree", pickle().integer(1)}})},
        {"ds_config", config()},
        {"ds_version", pickle().string("0.19.8")},
        {"num_experts", pickle().list(std::move(counts))},
        {"ds_autoep_layers", model_.autoep ? layers() : pickle().none()}};
    return builder_.finish("mp_rank_00_model_states.pt", builder_.dict(root));
  }

  FileBlueprint optim_file(int rank) {
    const NodeId root = builder_.dict({{"optimizer", optimizer(rank)}});
    return builder_.finish("expp_rank_" + std::to_string(rank) + "_mp_rank_00_optim_states.pt",
                           root);
  }

  FileBlueprint expert_file(int layer, int number) {
    Entries entries;
    for (const auto& [name, i] : expert_entries(model_, {layer, number})) {
      const Shape& shape = model_.parameters[i].shape;
      entries.emplace_back(name,
                           whole(expert_bytes(model_, {layer, number}, i), model_.dtype,
                                 model_.autoep ? Shape(shape.begin() + 1, shape.end()) : shape));
    }
    return builder_.finish("layer_" + std::to_string(layer) + "_expert_" + std::to_string(number) +
                               "_mp_rank_00_model_states.pt",
                           builder_.dict(std::move(entries)));
  }

 private:
  NodeId module_tensor(size_t i) {
    return whole(module_bytes(model_, i), model_.dtype, model_.parameters[i].shape);
  }

  NodeId state_tensor(const Model& part, int number, int state) {
    const DType dtype = state_dtype(part, state);
    return whole(pack(state_bits(part, number, state), dtype), dtype,
                 part.parameters[static_cast<size_t>(number)].shape);
  }

  // ds_autoep_layers, as rank 0 writes it (module_inject/auto_ep_layer.py).
  NodeId layers() {
    const auto integer = [&](int64_t value) { return pickle().integer(value); };
    std::vector<NodeId> result;
    for (size_t layer = 0; layer < model_.experts.size(); ++layer) {
      const int experts = model_.experts[layer];
      const std::vector<int> held =
          reference::owners({.cut = reference::Cut::kColumn}, experts, job_.expert);
      std::vector<NodeId> ranks;
      int64_t first = 0;
      for (int rank = 0; rank < job_.expert; ++rank) {
        std::vector<NodeId> ids;
        for (int id = 0; id < experts; ++id) {
          if (held[static_cast<size_t>(id)] == rank) ids.push_back(integer(id));
        }
        if (rank == 0) first = static_cast<int64_t>(ids.size());
        ranks.push_back(
            builder_.dict({{"rank", integer(rank)}, {"experts", pickle().list(std::move(ids))}}));
      }
      const std::string path = "m" + std::to_string(layer) + ".mlp";
      result.push_back(builder_.dict(
          {{"moe_layer_id", integer(static_cast<int64_t>(layer))},
           {"module_path", pickle().string(path)},
           {"num_experts", integer(experts)},
           {"num_local_experts", integer(first)},
           {"ep_size", integer(job_.expert)},
           {"expert_placement", builder_.dict({{"version", integer(1)},
                                               {"num_experts", integer(experts)},
                                               {"ep_size", integer(job_.expert)},
                                               {"ranks", pickle().list(std::move(ranks))}})},
           {"expert_key_prefix", pickle().string(path + ".experts")},
           {"checkpoint_format", pickle().string("per_expert_files")},
           {"checkpoint_format_version", pickle().none()},
           {"ep_group_name", pickle().string("ep_size_" + std::to_string(job_.expert))},
           {"ep_rank", integer(0)},
           {"expert_data_parallel_rank", integer(0)},
           {"expert_data_parallel_world_size", integer(job_.ranks() / job_.expert)},
           {"global_expert_start", integer(0)},
           {"global_expert_end", integer(first)}}));
    }
    return pickle().list(std::move(result));
  }

  NodeId config() {
    Entries root = {{"train_batch_size", pickle().integer(64)},
                    {"zero_optimization",
                     builder_.dict({{"stage", pickle().integer(0)},
                                    {"sub_group_size", pickle().integer(model_.sub_group_size)},
                                    {"parameter_alignment", pickle().boolean(model_.aligned)}})},
                    {"use_data_before_expert_parallelism", pickle().boolean(model_.data_first)}};
    const char* section = model_.dtype == DType::kBFloat16 ? "bf16" : "fp16";
    if (model_.dtype != DType::kFloat32)
      root.emplace_back(section, builder_.dict({{"enabled", pickle().boolean(true)}}));
    return builder_.dict(std::move(root));
  }

  // One parameter's entry in the optimizer's state, if it has any.
  void add_states(const Model& part, int number, int group, int64_t index,
                  std::vector<NodeId>* states) {
    Entries entry;
    for (const ScalarKind& kind : model_.scalars)
      entry.emplace_back(kind.name, scalar(kind, group));
    for (size_t s = 0; s < model_.states.size(); ++s)
      entry.emplace_back(model_.states[s].name, state_tensor(part, number, static_cast<int>(s)));
    if (entry.empty()) return;
    states->push_back(pickle().integer(index));
    states->push_back(builder_.dict(std::move(entry)));
  }

  NodeId optimizer(int rank) {
    std::vector<NodeId> states, groups, masters;
    int64_t index = 0;
    for (const int trained : {-1, rank}) {
      const int group = trained < 0 ? 0 : 1;
      const Model part = trained_by(model_, job_, trained);
      for (const std::vector<int>& members : optimizer_groups(part)) {
        std::vector<NodeId> numbers, tensors;
        for (int number : members) {
          add_states(part, number, group, index, &states);
          numbers.push_back(pickle().integer(index++));
          if (model_.dtype != DType::kFloat32) tensors.push_back(state_tensor(part, number, -1));
        }
        Entries hyper = {{"lr", pickle().real(0.001 * (group + 1))}};
        if (group == 1) {
          hyper.emplace_back("name", pickle().string("ep_size_" + std::to_string(job_.expert)));
          hyper.emplace_back("moe", pickle().boolean(true));
        }
        hyper.emplace_back("params", pickle().list(std::move(numbers)));
        groups.push_back(builder_.dict(std::move(hyper)));
        masters.push_back(pickle().list(std::move(tensors)));
      }
    }
    const NodeId plain = builder_.dict({{"state", pickle().dict(std::move(states))},
                                        {"param_groups", pickle().list(std::move(groups))}});
    if (model_.dtype == DType::kFloat32) return plain;
    return builder_.dict({{"dynamic_loss_scale", pickle().boolean(false)},
                          {"cur_scale", pickle().real(1.0)},
                          {"cur_iter", pickle().integer(5)},
                          {"optimizer_state_dict", plain},
                          {"fp32_groups", pickle().list(std::move(masters))}});
  }

  const Model& model_;
  const Job& job_;
};

}  // namespace

ExpertPlace expert_place(const std::string& name) {
  ExpertPlace place;
  const bool expert = std::sscanf(name.c_str(), "m%d.deepspeed_moe.experts.deepspeed_experts.%d.",
                                  &place.layer, &place.number) == 2;
  return expert ? place : ExpertPlace{};
}

int stack_layer(const std::string& name) {
  int layer = -1, matrix = 0;
  const bool stack = std::sscanf(name.c_str(), "m%d.mlp.experts.w%d", &layer, &matrix) == 2;
  return stack ? layer : -1;
}

bool is_expert(const std::string& name) {
  return expert_place(name).layer >= 0 || stack_layer(name) >= 0;
}

std::vector<std::pair<std::string, size_t>> expert_entries(const Model& model, ExpertPlace place) {
  std::vector<std::pair<std::string, size_t>> entries;
  for (size_t i = 0; i < model.parameters.size(); ++i) {
    const std::string& name = model.parameters[i].name;
    const ExpertPlace own = expert_place(name);
    if (own.layer == place.layer && own.number == place.number) entries.emplace_back(name, i);
    if (model.autoep && stack_layer(name) == place.layer)
      entries.emplace_back(name + "." + std::to_string(place.number), i);
  }
  return entries;
}

std::string expert_bytes(const Model& model, ExpertPlace place, size_t parameter) {
  const std::string bytes = module_bytes(model, parameter);
  if (!model.autoep) return bytes;
  const size_t slice = bytes.size() / static_cast<size_t>(model.parameters[parameter].shape[0]);
  return bytes.substr(static_cast<size_t>(place.number) * slice, slice);
}

namespace {

// The rows of the stacks that the rank holds, or none; and nothing else but for rank −1.
Model stacks_of(const Model& model, const Job& job, int rank) {
  Model part = model;
  part.heads = 0;
  part.grain = 1;
  if (rank >= 0) part.tensor_rank = rank;
  if (rank >= 0) part.tensor_ranks = job.expert;
  for (size_t i = 0; i < part.parameters.size(); ++i) {
    ModelParameter& parameter = part.parameters[i];
    const bool stack = stack_layer(parameter.name) >= 0;
    if (stack != (rank >= 0)) parameter.group = -1;
    if (!stack || rank < 0) continue;
    parameter.cut = reference::Cut::kColumn;
    parameter.whole = parameter.shape;
    parameter.shape =
        reference::shard_shape({.cut = reference::Cut::kColumn}, parameter.shape, rank, job.expert);
  }
  return part;
}

}  // namespace

Model trained_by(const Model& model, const Job& job, int rank) {
  if (model.autoep) return stacks_of(model, job, rank);
  Model part = model;
  for (ModelParameter& parameter : part.parameters) {
    const ExpertPlace place = expert_place(parameter.name);
    if (place.layer < 0) {
      if (rank >= 0) parameter.group = -1;
      continue;
    }
    const int local = model.experts[static_cast<size_t>(place.layer)] / job.expert;
    if (place.number / local != rank) parameter.group = -1;
  }
  return part;
}

Model in_groups(const Model& model, const Job& job) {
  Model result = model;
  if (model.most == 0) return result;
  for (int rank = 0; rank < job.expert; ++rank) {
    const Model part = trained_by(model, job, rank);
    int group = 1;
    int64_t filled = 0;
    for (size_t i = 0; i < part.parameters.size(); ++i) {
      if (part.parameters[i].group < 0) continue;
      const int64_t elements = numel(part.parameters[i].shape);
      if (filled > 0 && filled + elements > model.most) {
        ++group;
        filled = 0;
      }
      filled += elements;
      result.parameters[i].group = group;
    }
  }
  return result;
}

std::string local_name(const Model& model, const Job& job, size_t parameter) {
  const std::string& name = model.parameters[parameter].name;
  const ExpertPlace place = expert_place(name);
  if (place.layer < 0) return name;
  const int local = model.experts[static_cast<size_t>(place.layer)] / job.expert;
  const std::string number = "." + std::to_string(place.number) + ".";
  const size_t at = name.find(number);
  return name.substr(0, at) + "." + std::to_string(place.number % local) +
         name.substr(at + number.size() - 1);
}

void write_expert_source(Storage& storage, const std::string& folder, const Model& model,
                         const Job& job) {
  const Model grouped = in_groups(model, job);
  std::vector<FileBlueprint> files = {ExpertFileWriter(grouped, job).model_file()};
  for (int rank = 0; rank < job.expert; ++rank)
    files.push_back(ExpertFileWriter(grouped, job).optim_file(rank));
  for (size_t layer = 0; layer < model.experts.size(); ++layer) {
    for (int number = 0; number < model.experts[layer]; ++number)
      files.push_back(ExpertFileWriter(model, job).expert_file(static_cast<int>(layer), number));
  }
  write_folder(storage, folder, std::move(files));
}

}  // namespace isoshard::properties
