// See rank_files.h: the model file of a rank.
#include <algorithm>
#include <map>

#include "checkpoint/deepspeed/names.h"
#include "core/numbers.h"
#include "engine/expert_files.h"
#include "engine/folding.h"
#include "engine/rank_writer.h"

namespace isoshard::engine {
namespace {

using checkpoint::FileBlueprint;
using checkpoint::NodeId;
using checkpoint::ObjectParts;
using checkpoint::TorchBuilder;

class ModelFile : public RankWriter {
 public:
  using RankWriter::RankWriter;

  FileBlueprint run() {
    const bool sharded = state_.stage > 0;
    const bool frozen = state_.stage >= 2 && !content_.exclude_frozen;
    const TrainingCounters& counters = state_.counters;
    const Topology& t = place_.topology;
    const bool layered = state_.pipeline_module;  // its module lies in the layers' files
    const NodeId modules = layered ? pickle().none() : module();
    Entries root = {
        {"module", modules},
        {"buffer_names", pickle().list({})},
        {"optimizer", sharded ? pickle().none() : stage0_optimizer()},
        {"param_shapes", sharded ? param_shapes() : pickle().none()},
        {"frozen_param_shapes", frozen ? frozen_shapes() : pickle().none()},
        {"shared_params", sharded ? shared_params() : pickle().none()},
        {"frozen_param_fragments", frozen ? frozen_fragments() : pickle().none()},
        {"lr_scheduler", scheduler()},
        {"data_sampler", pickle().none()},
        {"random_ltd", pickle().none()},
        {"skipped_steps", pickle().integer(counters.skipped_steps)},
        {"global_steps", pickle().integer(counters.steps)},
        {"global_samples", pickle().integer(counters.samples)},
        {"dp_world_size", pickle().integer(ranks())},
        {"mp_world_size", pickle().integer(place_.mp_ranks())},
        // The Ulysses mpu has sp for tp here (docs/deepspeed_errata.md); this is what is meant.
        {"checkpoint_parallel_dimensions",
         builder_.dict({{"pp_degree", pickle().integer(t.pipeline)},
                        {"tp_degree", pickle().integer(t.tensor)}})},
        {"ds_config", json_node(&builder_, content_.config)},
        {"ds_version", pickle().string(content_.version)}};
    if (has_experts(state_)) {
      add_experts(&root);
    } else if (t.tensor > 1) {
      root.emplace_back("universal_checkpoint_info",
                        builder_.dict(split_info(&builder_, state_, t.tensor)));
    }
    merge_client_state(&root);
    const std::string name = state_.stage == 3 ? checkpoint::model_file_name_of_rank(
                                                     place_.zero_rank(), place_.mp_rank())
                                               : checkpoint::model_file_name(place_.mp_rank());
    return builder_.finish(name, builder_.dict(std::move(root)));
  }

 private:
  void add_experts(Entries* root) {
    const std::vector<ExpertLayerPlace> layers = expert_layers(state_);
    std::vector<NodeId> counts;
    for (const ExpertLayerPlace& layer : layers) counts.push_back(pickle().integer(layer.experts));
    const NodeId list = expert_layers_node(&builder_, state_, place_, layers);
    root->emplace_back("num_experts", pickle().list(std::move(counts)));
    root->emplace_back("ds_autoep_layers", list);
    const bool folded = is_folded(state_, place_.topology);
    Entries info = folded ? split_info(&builder_, state_, place_.topology.tensor)
                          : Entries{{"universal_checkpoint_version", pickle().real(0.4)}};
    info.emplace_back("expert_parameter_patterns",
                      pickle().list({pickle().string(".*\\.experts\\.w[123]$")}));
    info.emplace_back("ds_autoep_layers", list);
    root->emplace_back("universal_checkpoint_info", builder_.dict(std::move(info)));
    if (folded) {
      root->emplace_back("folding",
                         folding_node(&builder_, state_, place_, FoldedFile::kModel, names_));
    }
  }

  // dict.update: keys that are there keep their place.
  void merge_client_state(Entries* root) {
    for (const auto& [key, value] : content_.client_state.items()) {
      const NodeId node = json_node(&builder_, value);
      const auto found = std::find_if(root->begin(), root->end(),
                                      [&](const auto& entry) { return entry.first == key; });
      if (found != root->end())
        found->second = node;
      else
        root->emplace_back(key, node);
    }
  }

  // Stages 1 and 2: views of one storage a group, padded as its flat buffer.
  void lay_out_groups() {
    for (const TrainedGroup& group : state_.groups) {
      std::vector<float> flat;
      std::vector<std::pair<int, int64_t>> begins;
      for (const int number : owned(group)) {
        begins.emplace_back(number, static_cast<int64_t>(flat.size()));
        const std::vector<float>& values = parameter(number).values;
        flat.insert(flat.end(), values.begin(), values.end());
      }
      flat.resize(static_cast<size_t>(group.buffer_size * ranks()), 0.0f);
      const int storage = value_storage(&builder_, flat, state_.dtype);
      for (const auto& [number, begin] : begins) {
        places_[number] = {.shape = parameter(number).shape, .storage = storage, .offset = begin};
      }
    }
  }

  NodeId module() {
    const bool experts = has_experts(state_);  // then every tensor is a copy
    if ((state_.stage == 1 || state_.stage == 2) && !experts) lay_out_groups();
    std::vector<NodeId> items;
    std::map<std::string, NodeId> by_name;
    for (size_t i = 0; i < state_.parameters.size(); ++i) {
      const TrainedParameter& p = state_.parameters[i];
      if (p.expert || (p.frozen() && content_.exclude_frozen)) continue;
      if (state_.stage == 3) {
        places_[static_cast<int>(i)] = {.shape = {0},
                                        .storage = value_storage(&builder_, {}, state_.dtype)};
      } else if (places_.count(static_cast<int>(i)) == 0) {
        places_[static_cast<int>(i)] = {
            .shape = p.shape,
            .storage = value_storage(&builder_, p.values, state_.dtype),
            .stride = numel(p.shape) == 0 ? contiguous_stride(p.whole) : Shape()};  // a slice of it
      }
      const NodeId node = builder_.tensor(places_.at(static_cast<int>(i)));
      const auto add = [&](const std::string& name, NodeId tensor) {
        names_.push_back(name);
        items.push_back(pickle().string(name));
        items.push_back(tensor);
      };
      add(p.name, node);
      if (const std::string alias = router_alias(p.name); experts && !alias.empty()) {
        add(alias, state_.stage == 3
                       ? builder_.tensor(
                             {.shape = {0}, .storage = value_storage(&builder_, {}, state_.dtype)})
                       : copy_of(p));
      }
      for (const auto& [alias, name] : state_.aliases) {
        if (name == p.name) by_name[alias] = builder_.tensor(places_.at(static_cast<int>(i)));
      }
    }
    for (const auto& [alias, node] : by_name) {
      names_.push_back(alias);
      items.push_back(pickle().string(alias));
      items.push_back(node);
    }
    return pickle().ordered_dict(std::move(items));
  }

  NodeId copy_of(const TrainedParameter& p) { return tensor(p.values, p.shape, state_.dtype); }

  NodeId integer_tuple(const Shape& shape) {
    std::vector<NodeId> items;
    for (const int64_t size : shape) items.push_back(pickle().integer(size));
    return pickle().tuple(std::move(items));
  }

  NodeId param_shapes() {
    const bool experts = has_experts(state_);
    std::vector<NodeId> groups;
    for (const TrainedGroup& group : state_.groups) {
      std::vector<NodeId> items;
      for (const int number : owned(group)) {
        items.push_back(pickle().string(parameter(number).module_name));
        // What is saved with experts is copied first, and torch.Size becomes a tuple on the way.
        items.push_back(experts ? integer_tuple(parameter(number).shape)
                                : builder_.size_node(parameter(number).shape));
      }
      groups.push_back(pickle().ordered_dict(std::move(items)));
    }
    return pickle().list(std::move(groups));
  }

  // Frozen is to DeepSpeed what no optimizer group has: a shard without elements too.
  template <class Make>
  NodeId of_frozen(Make make) {
    std::vector<NodeId> items;
    for (size_t i = 0; i < state_.parameters.size(); ++i) {
      const TrainedParameter& p = state_.parameters[i];
      if (!p.frozen() && numel(p.shape) > 0) continue;
      items.push_back(pickle().string(p.module_name));
      items.push_back(make(static_cast<int>(i), p));
    }
    return pickle().ordered_dict(std::move(items));
  }

  NodeId frozen_shapes() {
    return of_frozen([&](int, const TrainedParameter& p) { return builder_.size_node(p.shape); });
  }

  // Stage 2: the module's own tensor. Stage 3: this rank's slot.
  NodeId frozen_fragments() {
    return of_frozen([&](int number, const TrainedParameter& p) {
      if (state_.stage < 3) return builder_.tensor(places_.at(number));
      std::vector<float> slot = p.values;
      slot.resize(static_cast<size_t>(div_ceil(numel(p.shape), ranks())), 0.0f);
      return tensor(slot, {static_cast<int64_t>(slot.size())}, state_.dtype);
    });
  }

  // Global rank 0 alone fills it.
  NodeId shared_params() {
    Entries entries;
    for (const auto& [alias, name] : state_.aliases) {
      if (place_.zero_rank() == 0 && place_.mp_rank() == 0 && !state_.pipeline_module) {
        entries.emplace_back(alias, pickle().string(name));
      }
    }
    return builder_.dict(std::move(entries));
  }

  NodeId scheduler() {
    if (!state_.scheduled) return pickle().none();
    return builder_.dict(
        {{"last_batch_iteration", pickle().integer(state_.counters.schedule_iteration)}});
  }

  std::map<int, TorchBuilder::TensorSpec> places_;
  std::vector<std::string> names_;  // of the module's entries, in its order
};

}  // namespace

FileBlueprint model_file(const TrainingState& state, const RankPlace& place,
                         const SaveContent& content) {
  return ModelFile(state, place, content).run();
}

}  // namespace isoshard::engine
