// The universal form of a migrated state: the files of any universal form, and a model file that
// says what AutoEP's would (deepspeed/checkpoint/autoep_universal.py reads it).
#include <algorithm>
#include <map>

#include "checkpoint/deepspeed/migration.h"
#include "checkpoint/deepspeed/reshard_target.h"
#include "checkpoint/deepspeed/universal_blueprint.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

class MigratedModelFile {
 public:
  MigratedModelFile(const ShardedState& state, const Migration& migration)
      : state_(state), migration_(migration), pickle_(builder_.pickle) {}

  FileBlueprint run() {
    const int file = state_.model_files[0];
    MappingCopy root(&builder_, state_, {file, state_.document(file).pickle().root});
    root.set("module", module());
    root.set("param_shapes", param_shapes());
    root.set("ds_autoep_layers", layers(/*whole=*/true));
    root.set_after("universal_checkpoint_info",
                   builder_.dict({{"universal_checkpoint_version", pickle_.real(0.4)},
                                  {"expert_parameter_patterns",
                                   pickle_.list({pickle_.string("\\.experts\\.w[123]$")})},
                                  {"ds_autoep_layers", layers(/*whole=*/false)}}),
                   "ds_autoep_layers");
    return builder_.finish(state_.files[static_cast<size_t>(file)].relative, root.finish());
  }

 private:
  bool is_stack(const ParameterState& parameter) const {
    return parameter.split >= 0 && state_.split_of(parameter).kind == SplitKind::kExperts;
  }

  NodeId tensor(int leaf, DType dtype, const Shape& shape) {
    return builder_.tensor(
        {.shape = shape, .storage = builder_.add_storage(whole_fill(leaf, numel(shape), dtype))});
  }

  NodeId module() {
    std::map<std::string, NodeId> nodes;
    const auto add = [&](const std::string& name, const ParameterState& parameter) {
      const int leaf = parameter.model_copy >= 0 ? parameter.model_copy : parameter.weight;
      nodes[name] = tensor(leaf, parameter.model_dtype, parameter.shape);
    };
    for (const ParameterState& parameter : state_.parameters) {
      if (!is_stack(parameter)) add(parameter.name, parameter);
    }
    for (const BufferState& buffer : state_.buffers) {
      const Leaf& leaf = state_.leaf(buffer.leaf);
      nodes[buffer.name] = tensor(buffer.leaf, leaf.dtype, leaf.shape);
    }
    for (const Alias& alias : state_.aliases) {
      const ParameterState* target = state_.find_parameter(alias.target);
      if (target != nullptr && alias.recorded) nodes[alias.name] = nodes.at(alias.target);
      if (target != nullptr && !alias.recorded) add(alias.name, *target);
    }
    std::vector<NodeId> items;
    for (const std::string& name : state_.module_order) {
      const auto found = nodes.find(name);
      if (found == nodes.end()) continue;
      items.push_back(pickle_.string(name));
      items.push_back(found->second);
    }
    return pickle_.ordered_dict(std::move(items));
  }

  NodeId param_shapes() {
    std::vector<NodeId> groups;
    for (const GroupState& group : state_.groups) {
      std::vector<NodeId> items;
      for (int number : group.flat_order) {
        const ParameterState& parameter = state_.parameters[static_cast<size_t>(number)];
        items.push_back(pickle_.string(parameter.name));
        items.push_back(builder_.tuple_node(
            is_stack(parameter) ? state_.split_of(parameter).map.ranks[0].shard_shape
                                : parameter.shape));
      }
      groups.push_back(pickle_.ordered_dict(std::move(items)));
    }
    return pickle_.list(std::move(groups));
  }

  NodeId layers(bool whole) {
    std::vector<NodeId> result;
    for (const ExpertLayer& layer : migration_.layers)
      result.push_back(whole ? whole_entry(layer) : short_entry(layer));
    return pickle_.list(std::move(result));
  }

  // What the converter keeps of a layer.
  NodeId short_entry(const ExpertLayer& layer) {
    return builder_.dict({{"moe_layer_id", pickle_.integer(layer.layer_id)},
                          {"module_path", pickle_.string(layer.module_path)},
                          {"expert_key_prefix", pickle_.string(layer.prefix)},
                          {"num_experts", pickle_.integer(layer.experts)},
                          {"num_local_experts", pickle_.integer(layer.held_by(0))},
                          {"ep_size", pickle_.integer(layer.ep_size)}});
  }

  NodeId whole_entry(const ExpertLayer& layer) {
    std::vector<std::pair<std::string, NodeId>> maps;
    for (const char* matrix : {".w1", ".w2", ".w3"}) {
      const ParameterState* stack = state_.find_parameter(layer.prefix + matrix);
      maps.emplace_back(layer.prefix + matrix, map_node(&builder_, state_.split_of(*stack).map));
    }
    const int64_t replicas = state_.topology.zero_ranks() / layer.ep_size;
    return builder_.dict(
        {{"moe_layer_id", pickle_.integer(layer.layer_id)},
         {"module_path", pickle_.string(layer.module_path)},
         {"num_experts", pickle_.integer(layer.experts)},
         {"num_local_experts", pickle_.integer(layer.held_by(0))},
         {"ep_size", pickle_.integer(layer.ep_size)},
         {"expert_placement", placement_node(&builder_, layer.placement)},
         {"affine_maps", builder_.dict({{"version", pickle_.integer(1)},
                                        {"params", builder_.dict(std::move(maps))}})},
         {"expert_key_prefix", pickle_.string(layer.prefix)},
         {"checkpoint_format", pickle_.string("per_expert_files")},
         {"checkpoint_format_version", pickle_.none()},
         {"ep_group_name", pickle_.string("ep_size_" + std::to_string(layer.ep_size))},
         {"ep_rank", pickle_.integer(0)},
         {"expert_data_parallel_rank", pickle_.integer(0)},
         {"expert_data_parallel_world_size", pickle_.integer(replicas)},
         {"global_expert_start", pickle_.integer(0)},
         {"global_expert_end", pickle_.integer(layer.held_by(0))}});
  }

  const ShardedState& state_;
  const Migration& migration_;
  TorchBuilder builder_;
  Pickle& pickle_;
};

}  // namespace

TargetFiles migration_blueprints(const ShardedState& state, const Migration& migration) {
  return universal_blueprints(
      state, {.model_file = MigratedModelFile(state, migration).run(), .plain_alignment = true});
}

}  // namespace isoshard::checkpoint
