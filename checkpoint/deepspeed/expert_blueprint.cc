// Experts of a target: AutoEP's metadata in the model file, and one file an expert
// (deepspeed/runtime/engine.py, _save_moe_checkpoint).
#include <algorithm>
#include <map>
#include <tuple>

#include "checkpoint/deepspeed/experts.h"
#include "checkpoint/deepspeed/names.h"
#include "checkpoint/deepspeed/reshard_target.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

// ds_autoep_layers as a rank of the target writes it: the source's entries, what depends on the
// topology made anew.
class LayerWriter {
 public:
  LayerWriter(TorchBuilder* builder, const ReshardTarget& target, TargetRank rank)
      : rank_(rank),
        builder_(*builder),
        pickle_(builder->pickle),
        target_(target),
        file_(target.model_file()),
        fields_(target.state.document(file_)),
        experts_(*target.experts) {}

  NodeId list() {
    std::vector<NodeId> layers;
    size_t next = 0;
    for (NodeId entry : fields_.list(autoep_layers(fields_, fields_.root()), "ds_autoep_layers"))
      layers.push_back(layer(entry, experts_.layers()[next++]));
    return pickle_.list(std::move(layers));
  }

 private:
  NodeId layer(NodeId entry, const ExpertLayer& layer) {
    const int64_t ranks = target_.topology.expert;
    const auto placement = placed_in_blocks(layer.experts, ranks);
    MappingCopy copy(&builder_, target_.state, {file_, entry});
    const auto [expert_rank, replica] = expert_rank_of(target_, rank_);
    const std::vector<int64_t>& own = placement.at(static_cast<size_t>(expert_rank));
    copy.set("num_local_experts", pickle_.integer(static_cast<int64_t>(own.size())));
    copy.set("ep_size", pickle_.integer(ranks));
    // Equal blocks need no words, and older forms have none; unequal ones do.
    const auto set = layer.experts % ranks == 0 ? &MappingCopy::set_if_present : &MappingCopy::set;
    (copy.*set)("expert_placement", placement_node(&builder_, placement));
    (copy.*set)("affine_maps", maps(layer));
    copy.set_if_present("ep_group_name", pickle_.string("ep_size_" + std::to_string(ranks)));
    const bool stage3 = target_.stage == 3;
    if (stage3 || target_.state.stage == 3) {
      copy.set("checkpoint_format",
               pickle_.string(stage3 ? "zero3_partitioned" : "per_expert_files"));
      copy.set("checkpoint_format_version", stage3 ? pickle_.integer(1) : pickle_.none());
    }
    copy.set_if_present("ep_rank", pickle_.integer(expert_rank));
    copy.set_if_present("expert_data_parallel_rank", pickle_.integer(replica));
    copy.set_if_present("expert_data_parallel_world_size",
                        pickle_.integer(target_.expert_world() / ranks));
    copy.set_if_present("global_expert_start", pickle_.integer(own.front()));
    copy.set_if_present("global_expert_end", pickle_.integer(own.back() + 1));
    return copy.finish();
  }

  NodeId maps(const ExpertLayer& layer) {
    std::vector<std::pair<std::string, NodeId>> params;
    for (size_t i = 0; i < target_.state.parameters.size(); ++i) {
      const std::string& name = target_.state.parameters[i].name;
      const ExpertLayer* owner = experts_.layer_of(name);
      if (owner != nullptr && owner->prefix == layer.prefix)
        params.emplace_back(name, map_node(&builder_, target_.maps[i]));
    }
    return builder_.dict(
        {{"version", pickle_.integer(1)}, {"params", builder_.dict(std::move(params))}});
  }

  TargetRank rank_;
  TorchBuilder& builder_;
  Pickle& pickle_;
  const ReshardTarget& target_;
  int file_;
  const Fields fields_;
  const ExpertInfo& experts_;
};

// One expert's file: the tensors of some parameters, cut to this expert.
class ExpertFile {
 public:
  ExpertFile(ReshardTarget* target, int64_t layer, int64_t expert)
      : target_(*target),
        path_("layer_" + std::to_string(layer) + "_expert_" + std::to_string(expert) +
              "_mp_rank_00_model_states.pt") {}

  // Folded: the file of the rank which wrote the source's, and says so.
  void keep_place(int file) {
    if (!entries_.empty()) return;
    path_ = target_.state.files[static_cast<size_t>(file)].relative;
    folding_ = copy_folding(&builder_, target_.state, file);
  }

  // Elements [begin, begin + numel(shape)) of the parameter under that name.
  void add(const std::string& name, const ParameterState& parameter, const Shape& shape,
           int64_t begin) {
    const int leaf = target_.model_leaf(parameter);
    const int64_t count = numel(shape);
    StorageFill fill{
        .dtype = parameter.model_dtype, .numel = count, .runs = {}, .copy = {}, .literal = {}};
    if (count > 0) fill.runs.push_back({leaf, begin, count, 0});
    const int storage = builder_.add_storage(std::move(fill));
    entries_.emplace_back(name, builder_.tensor({.shape = shape, .storage = storage}));
  }

  FileBlueprint finish() {
    if (folding_ != kNoNode) entries_.emplace_back("folding", folding_);
    return builder_.finish(path_, builder_.dict(std::move(entries_)));
  }

 private:
  ReshardTarget& target_;
  std::string path_;
  TorchBuilder builder_;
  NodeId folding_ = kNoNode;
  std::vector<std::pair<std::string, NodeId>> entries_;
};

// The number of a native layer: that of the file where its experts lie, or else the place of its
// path among all of them.
int64_t layer_number(const ShardedState& state, const ParameterState& parameter, size_t otherwise) {
  if (parameter.model_copy >= 0 && !state.leaf(parameter.model_copy).fragments.empty()) {
    const int file = state.leaf(parameter.model_copy).fragments[0].file;
    const std::string& name = state.files[static_cast<size_t>(file)].relative;
    if (const auto number = layer_in_file_name(name)) return *number;
  }
  return static_cast<int64_t>(otherwise);
}

// The source's files of each expert, by "layer_<L>_expert_<E>".
using ExpertFiles = std::map<std::string, std::vector<int>>;

ExpertFiles expert_files(const ShardedState& state) {
  ExpertFiles files;
  for (size_t i = 0; i < state.files.size(); ++i) {
    const std::string& name = state.files[i].relative;
    if (parse_file_name(name).kind == FileName::Kind::kExpert)
      files[expert_in_file_name(name)].push_back(static_cast<int>(i));
  }
  return files;
}

std::vector<int> files_of(const ExpertFiles& files, int64_t layer, int64_t expert) {
  const auto found =
      files.find("layer_" + std::to_string(layer) + "_expert_" + std::to_string(expert));
  return found == files.end() ? std::vector<int>{} : found->second;
}

}  // namespace

NodeId copy_folding(TorchBuilder* builder, const ShardedState& state, int file) {
  const Fields fields(state.document(file));
  return builder->copy(fields.document(), file, fields.need(fields.root(), "folding"));
}

void add_folding(TorchBuilder* builder, const ReshardTarget& target, TargetRank rank,
                 std::vector<std::pair<std::string, NodeId>>* entries) {
  if (!target.folded()) return;
  const auto own = static_cast<size_t>(rank.mp * target.ranks + rank.zero);
  entries->emplace_back("folding",
                        copy_folding(builder, target.state, target.state.optim_files[own]));
}

NodeId placement_node(TorchBuilder* builder, const std::vector<std::vector<int64_t>>& placement) {
  Pickle& pickle = builder->pickle;
  std::vector<NodeId> ranks;
  int64_t experts = 0;
  for (const std::vector<int64_t>& held : placement) {
    std::vector<NodeId> ids;
    for (int64_t id : held) ids.push_back(pickle.integer(id));
    experts += static_cast<int64_t>(held.size());
    ranks.push_back(builder->dict({{"rank", pickle.integer(static_cast<int64_t>(ranks.size()))},
                                   {"experts", pickle.list(std::move(ids))}}));
  }
  return builder->dict({{"version", pickle.integer(1)},
                        {"num_experts", pickle.integer(experts)},
                        {"ep_size", pickle.integer(static_cast<int64_t>(placement.size()))},
                        {"ranks", pickle.list(std::move(ranks))}});
}

void set_expert_entries(TorchBuilder* builder, const ReshardTarget& target, TargetRank rank,
                        MappingCopy* root) {
  if (target.state.expert_layout != ExpertLayout::kAutoEp) return;
  const int file = target.model_file();
  const Fields fields(target.state.document(file));
  Pickle& pickle = builder->pickle;
  LayerWriter layers(builder, target, rank);
  const bool old_key = fields.maybe(fields.root(), "ds_autoep_layers") == kNoNode;
  root->set(old_key ? "autoep_layers" : "ds_autoep_layers", layers.list());
  const NodeId info = fields.maybe(fields.root(), "universal_checkpoint_info");
  if (info == kNoNode) return;
  MappingCopy copy(builder, target.state, {file, info});
  for (const char* key :
       {"parameter_with_row_parallelism_patterns", "tp_replicated_parameter_patterns",
        "vocabulary_parameter_patterns", "parameter_with_sub_params", "sub_param_shard_widths",
        "parameter_to_average_patterns", "parameter_with_2_sub_params_cat_dim_0",
        "autotp_unsupported_parameter_patterns", "affine_map"}) {
    if (!target.folded()) copy.erase(key);  // of tensor-parallel ranks, which it has none of
  }
  if (target.folded()) {
    const int own = target.state.model_files[static_cast<size_t>(rank.mp)];
    root->set("folding", copy_folding(builder, target.state, own));
  } else {
    root->erase("folding");
  }
  copy.set_if_present("expert_parameter_patterns",
                      pickle.list({pickle.string(".*\\.experts\\.w[123]$")}));
  copy.set_if_present("ds_autoep_layers", layers.list());
  root->set("universal_checkpoint_info", copy.finish());
}

std::vector<FileBlueprint> expert_blueprints(ReshardTarget* target) {
  const ShardedState& state = target->state;
  const ExpertInfo& experts = *target->experts;
  // By layer, expert and, folded, the source's file: every rank of one dp rank writes its own.
  std::map<std::tuple<int64_t, int64_t, int>, ExpertFile> files;
  const auto file_of = [&](int64_t layer, int64_t expert, int source = -1) -> ExpertFile& {
    return files.try_emplace({layer, expert, source}, target, layer, expert).first->second;
  };
  const auto sources = target->folded() ? expert_files(state) : ExpertFiles{};
  std::map<std::string, int64_t> layers;  // native: number by path
  for (size_t i = 0; i < state.parameters.size(); ++i) {
    const ParameterState& parameter = state.parameters[i];
    if (!target->is_expert(static_cast<int>(i))) continue;
    if (const auto expert = ExpertInfo::expert_number(parameter.name)) {
      const auto [layer, fresh] = layers.try_emplace(expert->first, 0);
      if (fresh) layer->second = layer_number(state, parameter, layers.size() - 1);
      file_of(layer->second, expert->second).add(parameter.name, parameter, parameter.shape, 0);
      continue;
    }
    const ExpertLayer& layer = *experts.layer_of(parameter.name);
    const Shape shape(parameter.shape.begin() + 1, parameter.shape.end());
    for (int64_t id = 0; id < layer.experts; ++id) {
      const std::string name = parameter.name + "." + std::to_string(id);
      if (!target->folded())
        file_of(layer.layer_id, id).add(name, parameter, shape, id * numel(shape));
      for (int source : files_of(sources, layer.layer_id, id)) {
        ExpertFile& file = file_of(layer.layer_id, id, source);
        file.keep_place(source);
        file.add(name, parameter, shape, id * numel(shape));
      }
    }
  }
  std::vector<FileBlueprint> result;
  for (auto& [key, file] : files) result.push_back(file.finish());
  return result;
}

}  // namespace isoshard::checkpoint
