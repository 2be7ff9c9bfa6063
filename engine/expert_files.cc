// See expert_files.h.
#include "engine/expert_files.h"

#include <algorithm>
#include <numeric>

#include "checkpoint/deepspeed/experts.h"
#include "checkpoint/deepspeed/names.h"
#include "checkpoint/deepspeed/reshard_target.h"
#include "core/affine_map.h"
#include "engine/folding.h"
#include "engine/rank_writer.h"

namespace isoshard::engine {
namespace {

using checkpoint::FileBlueprint;
using checkpoint::NodeId;
using checkpoint::Pickle;
using checkpoint::TorchBuilder;

constexpr const char* kStacks[] = {".w1", ".w2", ".w3"};

const TrainedParameter* find(const TrainingState& state, const std::string& name) {
  for (const TrainedParameter& p : state.parameters) {
    if (p.name == name) return &p;
  }
  return nullptr;
}

NodeId maps_node(TorchBuilder* builder, const TrainingState& state, const Topology& topology,
                 const std::string& prefix) {
  Entries maps;
  for (const char* stack : kStacks) {
    const TrainedParameter* p = find(state, prefix + stack);
    const std::vector<int64_t> widths(static_cast<size_t>(topology.expert),
                                      p->whole[0] / topology.expert);
    maps.emplace_back(p->name, checkpoint::map_node(builder, split_map(p->whole, 0, {widths})));
  }
  return builder->dict(
      {{"version", builder->pickle.integer(1)}, {"params", builder->dict(std::move(maps))}});
}

class ExpertOptimFile : public RankWriter {
 public:
  using RankWriter::RankWriter;

  FileBlueprint run() {
    return builder_.finish(checkpoint::expert_optim_file_name(place_.at.expert),
                           builder_.dict({{"optimizer", stage0_optimizer()}}));
  }
};

FileBlueprint expert_file(const TrainingState& state, const RankPlace& place,
                          const ExpertLayerPlace& layer, int64_t expert) {
  TorchBuilder builder;
  Entries entries;
  for (const char* stack : kStacks) {
    const TrainedParameter* p = find(state, layer.path + ".experts" + stack);
    const Shape shape(p->whole.begin() + 1, p->whole.end());
    const size_t count = static_cast<size_t>(numel(shape));
    const size_t begin = static_cast<size_t>(expert - layer.begin) * count;
    const int storage =
        value_storage(&builder, std::span(p->values).subspan(begin, count), state.dtype);
    entries.emplace_back(p->name + "." + std::to_string(expert),
                         builder.tensor({.shape = shape, .storage = storage}));
  }
  if (is_folded(state, place.topology)) {
    entries.emplace_back("folding", folding_node(&builder, state, place, FoldedFile::kExpert));
  }
  return builder.finish(expert_file_name(layer.layer, expert, place.at.tensor),
                        builder.dict(std::move(entries)));
}

// Ranks with the same expert- and tensor-parallel rank would write the same names: those whose
// numbers differ by a multiple of both degrees.
bool writes_experts(const RankPlace& place) {
  const Topology& t = place.topology;
  return place.zero_rank() * t.tensor + place.at.tensor < std::lcm(t.expert, t.tensor);
}

}  // namespace

std::vector<ExpertLayerPlace> expert_layers(const TrainingState& state) {
  const std::string end = ".experts.w1";
  std::vector<ExpertLayerPlace> layers;
  for (const TrainedParameter& p : state.parameters) {
    if (!p.expert || !p.name.ends_with(end)) continue;
    layers.push_back({.layer = static_cast<int64_t>(layers.size()),
                      .path = p.name.substr(0, p.name.size() - end.size()),
                      .experts = p.whole[0],
                      .begin = p.split_begin,
                      .held = p.shape[0]});
  }
  return layers;
}

bool has_experts(const TrainingState& state) {
  return std::ranges::any_of(state.groups, &TrainedGroup::expert);
}

std::string expert_group_name(const Topology& topology) {
  return "ep_size_" + std::to_string(topology.expert);
}

std::string router_alias(const std::string& name) {
  const std::string end = ".router.gate.weight";
  if (!name.ends_with(end)) return "";
  return name.substr(0, name.size() - end.size()) + ".gate.gate.weight";
}

std::string expert_file_name(int64_t layer, int64_t expert, int tensor_rank) {
  return "layer_" + std::to_string(layer) + "_expert_" + std::to_string(expert) + "_" +
         checkpoint::model_file_name(tensor_rank);
}

NodeId expert_layers_node(TorchBuilder* builder, const TrainingState& state, const RankPlace& place,
                          const std::vector<ExpertLayerPlace>& layers) {
  Pickle& pickle = builder->pickle;
  const Topology& t = place.topology;
  const bool stage3 = state.stage == 3;
  std::vector<NodeId> list;
  for (const ExpertLayerPlace& layer : layers) {
    const std::string prefix = layer.path + ".experts";
    list.push_back(builder->dict(
        {{"moe_layer_id", pickle.integer(layer.layer)},
         {"module_path", pickle.string(layer.path)},
         {"num_experts", pickle.integer(layer.experts)},
         {"num_local_experts", pickle.integer(layer.held)},
         {"ep_size", pickle.integer(t.expert)},
         {"expert_placement", checkpoint::placement_node(
                                  builder, checkpoint::placed_in_blocks(layer.experts, t.expert))},
         {"affine_maps", maps_node(builder, state, t, prefix)},
         {"expert_key_prefix", pickle.string(prefix)},
         {"checkpoint_format", pickle.string(stage3 ? "zero3_partitioned" : "per_expert_files")},
         {"checkpoint_format_version", stage3 ? pickle.integer(1) : pickle.none()},
         {"ep_group_name", pickle.string(expert_group_name(t))},
         {"ep_rank", pickle.integer(place.at.expert)},
         {"expert_data_parallel_rank", pickle.integer(place.at.expert_data)},
         {"expert_data_parallel_world_size", pickle.integer(place.expert_data_ranks())},
         {"global_expert_start", pickle.integer(layer.begin)},
         {"global_expert_end", pickle.integer(layer.begin + layer.held)}}));
  }
  return pickle.list(std::move(list));
}

void add_expert_files(const TrainingState& state, const RankPlace& place,
                      const SaveContent& content, std::vector<FileBlueprint>* files) {
  const std::vector<ExpertLayerPlace> layers = expert_layers(state);
  if (layers.empty() || !writes_experts(place)) return;
  for (const ExpertLayerPlace& layer : layers) {
    for (int64_t expert = layer.begin; expert < layer.begin + layer.held; ++expert) {
      files->push_back(expert_file(state, place, layer, expert));
    }
  }
  if (state.stage == 0) files->push_back(ExpertOptimFile(state, place, content).run());
}

}  // namespace isoshard::engine
