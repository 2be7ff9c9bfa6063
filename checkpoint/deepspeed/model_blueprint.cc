// The model-state file of a target rank (deepspeed/runtime/engine.py, _save_checkpoint): the
// source's keys in the source's order; what depends on topology or stage is made anew
// (docs/formats/stage_change.md).
#include <algorithm>
#include <map>

#include "checkpoint/deepspeed/names.h"
#include "checkpoint/deepspeed/reshard_target.h"
#include "core/check.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

class ModelWriter {
 public:
  ModelWriter(ReshardTarget* target, TargetRank rank)
      : target_(*target),
        state_(target->state),
        rank_(rank.zero),
        mp_(rank.mp),
        buffers_(buffers_of(*target, rank)) {
    file_ = state_.model_files[0];
    if (!has_same_model_files(*target)) return;
    // A rank's own client state goes along where the ranks are the same.
    const int per_shard = target->stage == 3 ? target->ranks : 1;
    const int own_file = state_.model_files[static_cast<size_t>(mp_ * per_shard + rank_)];
    const std::vector<int>& own = state_.own_client_state;
    if (std::count(own.begin(), own.end(), own_file)) file_ = own_file;
  }

  FileBlueprint run() {
    const TorchFile& document = state_.document(file_);
    MappingCopy root(&builder_, state_, {file_, document.pickle().root});
    Pickle& pickle = builder_.pickle;
    if (target_.stages.held.empty())
      root.set("module", module());
    else
      root.set("buffer_names", stage_buffers());
    root.set("optimizer",
             target_.stage == 0 ? stage0_optimizer(&target_, &builder_, mp_) : pickle.none());
    root.set("param_shapes", target_.stage == 0 ? pickle.none() : param_shapes());
    const bool frozen = target_.stage >= 2 && !target_.frozen_excluded;
    root.set("frozen_param_shapes", frozen ? frozen_shapes() : pickle.none());
    root.set("frozen_param_fragments", frozen ? frozen_fragments() : pickle.none());
    root.set("shared_params", target_.stage == 0 ? pickle.none() : shared_params());
    root.set("dp_world_size", pickle.integer(target_.ranks));
    const int tensor = target_.topology.tensor;
    const int pipeline = target_.topology.pipeline;
    root.set("mp_world_size", pickle.integer(tensor * pipeline));
    const int degree = tensor > 1 ? tensor : target_.topology.sequence;
    root.set_if_present("checkpoint_parallel_dimensions",
                        builder_.dict({{"pp_degree", pickle.integer(pipeline)},
                                       {"tp_degree", pickle.integer(degree)}}));
    const bool callers = !target_.stages.held.empty() && state_.split_file >= 0;
    if (tensor > 1 || callers)
      root.set_after("universal_checkpoint_info", target_split_info(&builder_, target_),
                     "ds_version");
    else if (state_.split_file >= 0 && state_.expert_layout == ExpertLayout::kNone)
      root.erase("universal_checkpoint_info");
    root.set_if_present("ds_config", target_config(&builder_, target_));
    if (state_.expert_layout != ExpertLayout::kNone)
      set_expert_entries(&builder_, target_, {mp_, rank_}, &root);
    const std::string path =
        target_.stage == 3 ? model_file_name_of_rank(rank_, mp_) : model_file_name(mp_);
    return builder_.finish(path, root.finish());
  }

 private:
  NodeId stage_buffers() {
    std::vector<NodeId> names;
    for (const std::string& name :
         target_.stages.buffers[static_cast<size_t>(target_.stage_of(mp_))])
      names.push_back(builder_.pickle.string(name));
    return builder_.pickle.list(std::move(names));
  }

  // The tensor of each name of the module; the dictionary itself (order, _metadata) is copied.
  NodeId module() {
    if (target_.stage == 1 || target_.stage == 2) add_flat_storages();
    const TorchFile& document = state_.document(file_);
    const NodeId node = document.pickle().find(document.pickle().root, "module");
    for (const ParameterState& parameter : state_.parameters) {
      if (!target_.is_expert(number_of(parameter)))
        tensors_[parameter.name] = parameter_tensor(parameter);
    }
    for (const BufferState& buffer : state_.buffers)
      tensors_[buffer.name] = leaf_tensor(buffer.leaf);
    for (const Alias& alias : state_.aliases) {
      if (tensors_.count(alias.target) == 0) refuse_entry(alias.name, "a tensor, or a tied name");
      tensors_[alias.name] = alias_tensor(alias);
    }
    const std::vector<NodeId>& entries = document.pickle().entries(node);
    for (size_t i = 0; i + 1 < entries.size(); i += 2) {
      const auto found = tensors_.find(document.pickle().text(entries[i]));
      if (found == tensors_.end()) refuse_entry(document.pickle().text(entries[i]), "a tensor");
      builder_.replace(file_, entries[i + 1], found->second);
    }
    return builder_.copy(document, file_, node);
  }

  [[noreturn]] void refuse_entry(const std::string& name, const std::string& expected) const {
    throw Error(
        ErrorInfo{.code = ErrorCode::kIncomplete,
                  .what = "An entry of the module has no values in this checkpoint.",
                  .file = state_.files[static_cast<size_t>(file_)].path,
                  .entry = "module " + quote(name),
                  .expected = expected,
                  .found = "nothing; it may be tied to a frozen parameter that was excluded",
                  .next = "save again without exclude_frozen_parameters"});
  }

  // Stages 1 and 2: the trained parameters are views of one padded storage a group.
  void add_flat_storages() {
    for (const TargetBuffer* each : buffers_) {
      const TargetBuffer& buffer = *each;
      if (buffer.experts) continue;  // they have files of their own
      StorageFill fill{.dtype = DType::kFloat32,
                       .numel = buffer.partition * target_.ranks,
                       .runs = {},
                       .copy = {},
                       .literal = {}};
      std::vector<std::pair<int, int64_t>> places;
      for (size_t i = 0; i < buffer.parameters.size(); ++i) {
        const ParameterState& parameter = target_.parameter(buffer.parameters[i]);
        fill.dtype = parameter.model_dtype;
        const int64_t offset = std::get<FlatShard>(buffer.layouts[i].placement).group_offset;
        target_.add_runs(&fill, buffer.parameters[i], mp_,
                         {target_.model_leaf(parameter), 0, buffer.layouts[i].numel, offset});
        places.emplace_back(buffer.parameters[i], offset);
      }
      const int storage = builder_.add_storage(std::move(fill));
      for (const auto& [number, offset] : places) flat_place_[number] = {storage, offset};
    }
  }

  int number_of(const ParameterState& parameter) const {
    return static_cast<int>(&parameter - state_.parameters.data());
  }

  NodeId parameter_tensor(const ParameterState& parameter) {
    if (target_.stage == 3) {
      const int storage = builder_.add_storage(
          {.dtype = parameter.model_dtype, .numel = 0, .runs = {}, .copy = {}, .literal = {}});
      return builder_.tensor({.shape = {0}, .storage = storage});
    }
    const int number = number_of(parameter);
    const Shape shape = target_.shard_shape(number, mp_);
    TorchBuilder::TensorSpec& spec = place_of_[parameter.name];
    if (const auto place = flat_place_.find(number); place != flat_place_.end()) {
      spec = {.shape = shape, .storage = place->second.first, .offset = place->second.second};
    } else {
      StorageFill fill{.dtype = parameter.model_dtype,
                       .numel = numel(shape),
                       .runs = {},
                       .copy = {},
                       .literal = {}};
      target_.add_runs(&fill, number, mp_, {target_.model_leaf(parameter), 0, fill.numel, 0});
      spec = {.shape = shape, .storage = builder_.add_storage(std::move(fill))};
      // An empty shard stays the slice that it is of the whole tensor.
      if (numel(shape) == 0 && shape.size() == parameter.shape.size())
        spec.stride = contiguous_stride(parameter.shape);
    }
    return builder_.tensor(place_of_[parameter.name]);
  }

  NodeId alias_tensor(const Alias& alias) {
    const ParameterState* parameter = state_.find_parameter(alias.target);
    if (!alias.recorded && target_.stage != 3) {  // saved with bytes of its own
      const int leaf = alias.model_copy >= 0 ? alias.model_copy : target_.model_leaf(*parameter);
      return builder_.tensor(
          {.shape = parameter->shape, .storage = own_storage(leaf, parameter->model_dtype)});
    }
    if (target_.stage != 3) return builder_.tensor(place_of_.at(alias.target));
    const int storage = builder_.add_storage(
        {.dtype = parameter->model_dtype, .numel = 0, .runs = {}, .copy = {}, .literal = {}});
    return builder_.tensor({.shape = {0}, .storage = storage});
  }

  int own_storage(int number, DType dtype) {
    return builder_.add_storage(whole_fill(number, state_.leaf(number).size_elements(), dtype));
  }

  NodeId leaf_tensor(int number) {
    const Leaf& leaf = state_.leaf(number);
    return builder_.tensor({.shape = leaf.shape, .storage = own_storage(number, leaf.dtype)});
  }

  // Models with experts get plain tuples.
  NodeId shape_node(const Shape& shape) {
    if (state_.expert_layout == ExpertLayout::kNone) return builder_.size_node(shape);
    return builder_.tuple_node(shape);
  }

  NodeId param_shapes() {
    std::vector<NodeId> groups;
    for (const TargetBuffer* buffer : buffers_) {
      std::vector<NodeId> items;
      for (int number : buffer->parameters) {
        items.push_back(builder_.pickle.string(target_.name_of(number, *buffer)));
        items.push_back(shape_node(target_.shard_shape(number, buffer->shard)));
      }
      groups.push_back(builder_.pickle.ordered_dict(std::move(items)));
    }
    return builder_.pickle.list(std::move(groups));
  }

  NodeId frozen_shapes() {
    std::vector<NodeId> items;
    for (const ParameterState& parameter : state_.parameters) {
      if (parameter.group >= 0) continue;
      items.push_back(builder_.pickle.string(parameter.name));
      items.push_back(builder_.size_node(target_.shard_shape(number_of(parameter), mp_)));
    }
    return builder_.pickle.ordered_dict(std::move(items));
  }

  // Stage 2: the whole tensor, the module's own; stage 3: this rank's slot.
  NodeId frozen_fragments() {
    std::vector<NodeId> items;
    for (const ParameterState& parameter : state_.parameters) {
      if (parameter.group >= 0) continue;
      items.push_back(builder_.pickle.string(parameter.name));
      items.push_back(target_.stage == 3 ? frozen_slot(parameter)
                                         : builder_.tensor(place_of_.at(parameter.name)));
    }
    return builder_.pickle.ordered_dict(std::move(items));
  }

  NodeId frozen_slot(const ParameterState& parameter) {
    const int number = number_of(parameter);
    const int64_t count = numel(target_.shard_shape(number, mp_));
    const int64_t slot = slot_size(count, target_.ranks);
    StorageFill fill{.dtype = state_.leaf(parameter.weight).dtype,
                     .numel = slot,
                     .runs = {},
                     .copy = {},
                     .literal = {}};
    const TensorLayout layout{.numel = count,
                              .ranks = target_.ranks,
                              .placement = SlotShard{0, std::max<int64_t>(slot, 1)}};
    if (const RankFragment f = fragment_on(layout, rank_); f.count > 0) {
      target_.add_runs(&fill, number, mp_, {parameter.weight, f.begin, f.count, f.offset_local});
    }
    return builder_.tensor({.shape = {slot}, .storage = builder_.add_storage(std::move(fill))});
  }

  // Only global rank 0 fills it.
  NodeId shared_params() {
    std::vector<std::pair<std::string, NodeId>> entries;
    for (const Alias& alias : state_.aliases) {
      if (rank_ == 0 && mp_ == 0 && alias.recorded)
        entries.emplace_back(alias.name, builder_.pickle.string(alias.target));
    }
    return builder_.dict(std::move(entries));
  }

  ReshardTarget& target_;
  const ShardedState& state_;
  int rank_;  // in the partition group
  int mp_;    // tensor-parallel rank, or pipeline stage
  std::vector<const TargetBuffer*> buffers_;
  int file_;
  TorchBuilder builder_;
  std::map<std::string, NodeId> tensors_;
  std::map<int, std::pair<int, int64_t>> flat_place_;  // parameter → storage, offset
  std::map<std::string, TorchBuilder::TensorSpec> place_of_;
};

}  // namespace

FileBlueprint model_blueprint(ReshardTarget* target, TargetRank rank) {
  return ModelWriter(target, rank).run();
}

}  // namespace isoshard::checkpoint
