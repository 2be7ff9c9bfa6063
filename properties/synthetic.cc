// See synthetic.h. Keys and their order: deepspeed/runtime/engine.py, _save_checkpoint;
// zero/stage_1_and_2.py, zero/stage3.py and bf16_optimizer.py, state_dict (DeepSpeed 0.19.8).
#include "properties/synthetic.h"

#include "core/check.h"
#include "properties/hand_file.h"
#include "properties/split_info.h"

namespace isoshard::properties {
namespace {

using checkpoint::FileBlueprint;
using checkpoint::NodeId;
using checkpoint::ObjectParts;
using checkpoint::TorchBuilder;
using reference::Bits;
using Entries = std::vector<std::pair<std::string, NodeId>>;

constexpr const char* kVersion = "0.19.8";

// What all files of one folder have in common.
class FileWriter : public HandFile {
 public:
  FileWriter(const Model& model, const Job& job, int rank)
      : model_(model), job_(job), rank_(rank), form_(form_of(model, job)) {}

 protected:
  NodeId integers(const std::vector<int64_t>& values) {
    std::vector<NodeId> items;
    for (int64_t value : values) items.push_back(pickle().integer(value));
    return pickle().list(std::move(items));
  }
  bool bf16_optimizer() const { return uses_bf16_optimizer(model_, job_.stage); }

  std::string mp_rank() const { return mp_name(model_); }

  NodeId config() {
    Entries zero = {{"stage", pickle().integer(job_.stage)},
                    {"sub_group_size", pickle().integer(model_.sub_group_size)}};
    if (model_.round_robin) zero.emplace_back("round_robin_gradients", pickle().boolean(true));
    if (model_.aligned) zero.emplace_back("parameter_alignment", pickle().boolean(true));
    Entries root = {{"train_batch_size", pickle().integer(64)},
                    {"zero_optimization", builder_.dict(std::move(zero))}};
    root.emplace_back("tensor_parallel",
                      builder_.dict({{"autotp_size", pickle().integer(job_.tensor)}}));
    const char* section = model_.dtype == DType::kBFloat16 ? "bf16" : "fp16";
    if (model_.dtype != DType::kFloat32) {
      root.emplace_back(section, builder_.dict({{"enabled", pickle().boolean(true)}}));
    }
    if (model_.bf16_optimizer) {
      root.emplace_back("data_types",
                        builder_.dict({{"grad_accum_dtype", pickle().string("fp32")}}));
    }
    return builder_.dict(std::move(root));
  }

  const Model& model_;
  const Job& job_;
  int rank_;
  reference::Form form_;
};

class ModelFile : public FileWriter {
 public:
  using FileWriter::FileWriter;

  FileBlueprint run() {
    const bool stage3 = job_.stage == 3, layers = model_.layers > 0;
    if (!stage3 && !layers) lay_out_groups();
    const NodeId modules = layers ? pickle().none() : module();
    const bool frozen = job_.stage >= 2;
    Entries root = {
        {"module", modules},
        {"buffer_names", buffer_names()},
        {"optimizer", pickle().none()},
        {"param_shapes", param_shapes()},
        {"frozen_param_shapes", frozen ? frozen_shapes() : pickle().none()},
        {"shared_params", shared_params()},
        {"frozen_param_fragments", frozen ? frozen_fragments() : pickle().none()},
        {"lr_scheduler",
         builder_.dict({{"last_epoch", pickle().integer(5)}, {"_last_lr", pickle().real(0.25)}})},
        {"data_sampler", pickle().none()},
        {"random_ltd", pickle().none()},
        {"skipped_steps", pickle().integer(0)},
        {"global_steps", pickle().integer(5)},
        {"global_samples", pickle().integer(320)},
        {"dp_world_size", pickle().integer(job_.ranks())},
        {"mp_world_size", pickle().integer(job_.mp_ranks())},
        {"checkpoint_parallel_dimensions",
         builder_.dict(
             {{"pp_degree", pickle().integer(job_.pipeline)},
              {"tp_degree", pickle().integer(job_.tensor > 1 ? job_.tensor : job_.sequence)}})},
        {"ds_config", config()},
        {"ds_version", pickle().string(kVersion)}};
    if (job_.tensor > 1 || model_.callers_splits)
      root.emplace_back("universal_checkpoint_info", split_info());
    if (model_.client_state) {
      root.emplace_back(
          "client", builder_.dict({{"epoch", pickle().integer(2)},
                                   {"order", whole(std::string(24, '\5'), DType::kInt64, {3})}}));
    }
    const std::string name = stage3 ? "zero_pp_rank_" + std::to_string(rank_) + "_" : "";
    return builder_.finish(name + mp_rank() + "_model_states.pt", builder_.dict(std::move(root)));
  }

 private:
  // Stages 1 and 2: the owned parameters are views of one storage a group.
  void lay_out_groups() {
    const std::vector<std::vector<int>> groups = optimizer_groups(model_);
    for (const std::vector<int>& members : groups) {
      std::vector<int64_t> numels;
      for (int number : members) numels.push_back(numel(shape_of(number)));
      const reference::FlatBuffer buffer =
          reference::flat_buffer(numels, {.ranks = form_.ranks,
                                          .round_robin = form_.round_robin,
                                          .align_elements = form_.align_elements});
      const Bits poisoned(static_cast<size_t>(buffer.flat), poison(model_.dtype));
      std::string bytes = pack(poisoned, model_.dtype);
      const int storage = literal("", model_.dtype);
      for (size_t k = 0; k < buffer.order.size(); ++k) {
        const int number = members[static_cast<size_t>(buffer.order[k])];
        const std::string part = module_bytes(model_, static_cast<size_t>(number));
        const int64_t at = buffer.begin[k] * item_size_bytes(model_.dtype);
        bytes.replace(static_cast<size_t>(at), part.size(), part);
        places_[number] = {
            .shape = shape_of(number), .storage = storage, .offset = buffer.begin[k]};
      }
      builder_.storage(storage).numel = buffer.flat;
      builder_.storage(storage).literal = bytes;
    }
  }

  const Shape& shape_of(int number) const {
    return model_.parameters[static_cast<size_t>(number)].shape;
  }

  NodeId module() {
    std::vector<NodeId> items;
    const auto add = [&](const std::string& name, NodeId tensor) {
      items.push_back(pickle().string(name));
      items.push_back(tensor);
    };
    for (size_t i = 0; i < model_.parameters.size(); ++i) {
      add(model_.parameters[i].name, parameter_tensor(i));
      if (i < model_.buffers.size()) {
        const ModelBuffer& buffer = model_.buffers[i];
        add(buffer.name, whole(buffer_bytes(model_, i), buffer.dtype, buffer.shape));
      }
    }
    for (size_t i = 0; i < model_.parameters.size(); ++i) {
      if (!model_.parameters[i].alias.empty()) add(model_.parameters[i].alias, parameter_tensor(i));
    }
    return pickle().ordered_dict(std::move(items));
  }

  NodeId parameter_tensor(size_t i) {
    if (job_.stage == 3) return whole("", model_.dtype, {0});
    const int number = static_cast<int>(i);
    if (places_.count(number) == 0) {
      places_[number] = {.shape = shape_of(number),
                         .storage = literal(module_bytes(model_, i), model_.dtype)};
    }
    return builder_.tensor(places_.at(number));
  }

  NodeId buffer_names() {
    std::vector<NodeId> names;
    for (const std::string& name : buffers_on(model_)) names.push_back(pickle().string(name));
    return pickle().list(std::move(names));
  }

  NodeId param_shapes() {
    const std::vector<std::vector<int>> groups = optimizer_groups(model_);
    std::vector<NodeId> result;
    for (const reference::BufferMembers& buffer :
         reference::buffers_of(group_sizes(model_), form_)) {
      std::vector<NodeId> items;
      for (int index : buffer.parameters) {
        const int number = groups[static_cast<size_t>(buffer.group)][static_cast<size_t>(index)];
        items.push_back(pickle().string(model_.parameters[static_cast<size_t>(number)].name));
        items.push_back(builder_.size_node(shape_of(number)));
      }
      result.push_back(pickle().ordered_dict(std::move(items)));
    }
    return pickle().list(std::move(result));
  }

  NodeId frozen_shapes() {
    std::vector<NodeId> items;
    for (size_t i = 0; i < model_.parameters.size(); ++i) {
      if (model_.owned(i) || model_.elsewhere(i)) continue;
      items.push_back(pickle().string(model_.parameters[i].name));
      items.push_back(builder_.size_node(model_.parameters[i].shape));
    }
    return pickle().ordered_dict(std::move(items));
  }

  NodeId frozen_fragments() {
    std::vector<NodeId> items;
    for (size_t i = 0; i < model_.parameters.size(); ++i) {
      if (model_.owned(i) || model_.elsewhere(i)) continue;
      items.push_back(pickle().string(model_.parameters[i].name));
      items.push_back(job_.stage == 2 ? parameter_tensor(i) : frozen_slot(i));
    }
    return pickle().ordered_dict(std::move(items));
  }

  NodeId frozen_slot(size_t i) {
    const std::string bytes = module_bytes(model_, i);
    const size_t item = static_cast<size_t>(item_size_bytes(model_.dtype));
    Bits bits(bytes.size() / item, 0);
    for (size_t b = 0; b < bytes.size(); ++b) {
      bits[b / item] |= static_cast<uint32_t>(static_cast<unsigned char>(bytes[b]))
                        << (8 * (b % item));
    }
    const Bits slot = reference::partition_slots({bits}, form_.ranks, poison(model_.dtype))
                          .at(static_cast<size_t>(rank_));
    return whole(pack(slot, model_.dtype), model_.dtype, {static_cast<int64_t>(slot.size())});
  }

  NodeId split_info() { return SplitInfo(&builder_, model_, job_.tensor).run(); }

  NodeId shared_params() {
    Entries entries;
    for (const ModelParameter& parameter : model_.parameters) {
      if (parameter.alias.empty() || rank_ + model_.mp_rank > 0) continue;
      entries.emplace_back(parameter.alias, pickle().string(parameter.name));
    }
    return builder_.dict(std::move(entries));
  }

  std::map<int, TorchBuilder::TensorSpec> places_;
};

// The file of one layer of a pipeline on one tensor-parallel rank: names local to the layer.
class LayerFile : public FileWriter {
 public:
  using FileWriter::FileWriter;

  const Shape& shape_of(size_t number) const { return model_.parameters[number].shape; }

  FileBlueprint run(int layer) {
    std::vector<NodeId> items;
    const auto add = [&](const std::string& name, NodeId tensor) {
      items.push_back(pickle().string(name));
      items.push_back(tensor);
    };
    for (const LayerEntry& entry : entries_of(model_, layer)) {
      const size_t i = entry.parameter;
      if (entry.buffer)
        add(entry.name,
            whole(buffer_bytes(model_, i), model_.buffers[i].dtype, model_.buffers[i].shape));
      else
        add(entry.name, whole(module_bytes(model_, i), model_.dtype, shape_of(i)));
    }
    return builder_.finish(layer_name(model_, layer), pickle().ordered_dict(std::move(items)));
  }
};

class OptimFile : public FileWriter {
 public:
  // `states`: the reference's buffers, masters first, then the optimizer's states in order.
  OptimFile(const Model& model, const Job& job, int rank,
            const std::vector<reference::RankBuffers>& states)
      : FileWriter(model, job, rank),
        sizes_(group_sizes(model)),
        groups_(optimizer_groups(model)),
        states_(states) {}

  FileBlueprint run() {
    const NodeId state = job_.stage == 3 ? stage3() : stage12();
    const NodeId root = builder_.dict({{"optimizer_state_dict", state},
                                       {"ds_config", config()},
                                       {"ds_version", pickle().string(kVersion)}});
    const std::string prefix = model_.dtype == DType::kBFloat16 ? "bf16_" : "";
    const std::string rank = std::to_string(rank_);
    return builder_.finish(prefix + "zero_pp_rank_" + rank + "_" + mp_rank() + "_optim_states.pt",
                           root);
  }

 private:
  reference::FlatBuffer buffer_of(size_t group) const {
    return reference::flat_buffer(sizes_[group], {.ranks = form_.ranks,
                                                  .round_robin = form_.round_robin,
                                                  .align_elements = form_.align_elements});
  }

  // This rank's buffers of one state, padding poisoned.
  const std::vector<Bits>& buffers(int state) const {
    return states_[static_cast<size_t>(state + 1)].at(static_cast<size_t>(rank_));
  }

  NodeId stage12() {
    std::vector<int64_t> paddings, counts;
    std::vector<NodeId> masters, alignments, maps;
    const std::vector<Bits>& mine = buffers(-1);
    for (size_t g = 0; g < sizes_.size(); ++g) {
      const reference::FlatBuffer buffer = buffer_of(g);
      paddings.push_back(bf16_optimizer()
                             ? reference::group_padding_bf16(buffer, rank_, form_.ranks)
                             : reference::group_padding(buffer, rank_));
      const int64_t length =
          bf16_optimizer() ? buffer.partition : buffer.partition - paddings.back();
      masters.push_back(
          builder_.tensor({.shape = {length},
                           .storage = literal(pack(mine[g], DType::kFloat32), DType::kFloat32),
                           .requires_grad = true}));
      counts.push_back(form_.ranks);
      alignments.push_back(integers(buffer.align_padding));
      maps.push_back(slice_map(g));
    }
    Entries entries;
    if (!bf16_optimizer()) add_scaler(&entries);
    entries.emplace_back("clip_grad", pickle().real(1.0));
    entries.emplace_back("base_optimizer_state", base_state());
    entries.emplace_back("single_partition_of_fp32_groups", pickle().list(std::move(masters)));
    if (!bf16_optimizer()) entries.emplace_back("zero_stage", stage_enum());
    entries.emplace_back("group_paddings", integers(paddings));
    if (!bf16_optimizer()) {
      entries.emplace_back("param_alignment_paddings", pickle().list(std::move(alignments)));
    }
    entries.emplace_back("partition_count", integers(counts));
    entries.emplace_back("ds_version", pickle().string(kVersion));
    entries.emplace_back("param_slice_mappings", pickle().list(std::move(maps)));
    return builder_.dict(std::move(entries));
  }

  NodeId stage3() {
    Entries entries = {{"zero_stage", stage_enum()}};
    add_scaler(&entries);
    entries.emplace_back("partition_count", pickle().integer(form_.ranks));
    entries.emplace_back("optimizer_state_dict", base_state());
    std::vector<NodeId> flats;
    for (const Bits& flat : buffers(-1)) {
      flats.push_back(builder_.tensor_with_attribute(
          {.shape = {static_cast<int64_t>(flat.size())},
           .storage = literal(pack(flat, DType::kFloat32), DType::kFloat32),
           .requires_grad = true},
          "ds_id", "0_1"));
    }
    entries.emplace_back("fp32_flat_groups", pickle().list(std::move(flats)));
    return builder_.dict(std::move(entries));
  }

  // DeepSpeed accumulates in the optimizer's order even where the buffer is permuted; with
  // parameter_alignment it writes the true places.
  NodeId slice_map(size_t group) {
    const reference::FlatRules rules{.ranks = form_.ranks,
                                     .round_robin = form_.round_robin && model_.aligned,
                                     .align_elements = form_.align_elements};
    std::vector<NodeId> items;
    for (const reference::Slice& slice : reference::slices(sizes_[group], rules, rank_)) {
      const int number = groups_[group][static_cast<size_t>(slice.parameter)];
      ObjectParts parts;
      parts.newobj = true;
      parts.callable = pickle().global("deepspeed.utils.tensor_fragment", "fragment_address");
      parts.args = pickle().tuple({});
      parts.state = builder_.dict(
          {{"numel", pickle().integer(slice.count)}, {"start", pickle().integer(slice.start)}});
      items.push_back(pickle().string(model_.parameters[static_cast<size_t>(number)].name));
      items.push_back(pickle().object(std::move(parts)));
    }
    return pickle().ordered_dict(std::move(items));
  }

  NodeId base_state() {
    const std::vector<reference::BufferMembers> all = reference::buffers_of(sizes_, form_);
    std::vector<NodeId> states, hypers;
    for (size_t k = 0; k < all.size() && model_.stepped(); ++k) {
      states.push_back(pickle().integer(static_cast<int64_t>(k)));
      states.push_back(builder_.dict(state_entry(k, all[k].group)));
    }
    for (size_t g = 0; g < sizes_.size(); ++g) {
      std::vector<int64_t> numbers;
      for (size_t k = 0; k < all.size(); ++k) {
        if (all[k].group == static_cast<int>(g)) numbers.push_back(static_cast<int64_t>(k));
      }
      hypers.push_back(
          builder_.dict({{"lr", pickle().real(0.001 * static_cast<double>(g + 1))},
                         {"betas", pickle().tuple({pickle().real(0.9), pickle().real(0.999)})},
                         {"weight_decay", pickle().integer(0)},
                         {"params", integers(numbers)}}));
    }
    return builder_.dict({{"state", pickle().dict(std::move(states))},
                          {"param_groups", pickle().list(std::move(hypers))}});
  }

  Entries state_entry(size_t buffer, int group) {
    Entries entry;
    for (const ScalarKind& scalar : model_.scalars) {
      entry.emplace_back(scalar.name, HandFile::scalar(scalar, group));
    }
    for (size_t s = 0; s < model_.states.size(); ++s) {
      const StateKind& kind = model_.states[s];
      const Bits& bits = buffers(static_cast<int>(s)).at(buffer);
      entry.emplace_back(kind.name, whole(pack(bits, kind.dtype), kind.dtype,
                                          {static_cast<int64_t>(bits.size())}));
    }
    return entry;
  }

  NodeId stage_enum() {
    return pickle().reduce("deepspeed.runtime.zero.config", "ZeroStageEnum",
                           {pickle().integer(job_.stage)});
  }

  void add_scaler(Entries* entries) {
    ObjectParts parts;
    parts.newobj = true;
    parts.args = pickle().tuple({});
    Entries fields = {
        {"cur_scale", model_.dynamic_scale ? pickle().integer(256) : pickle().real(1.0)},
        {"dynamic", pickle().boolean(model_.dynamic_scale)}};
    if (model_.dynamic_scale) {
      fields.emplace_back("cur_iter", pickle().integer(4));
      fields.emplace_back("cur_hysteresis", pickle().integer(2));
    }
    parts.callable = pickle().global("deepspeed.runtime.fp16.loss_scaler",
                                     model_.dynamic_scale ? "DynamicLossScaler" : "LossScaler");
    parts.state = builder_.dict(std::move(fields));
    entries->emplace_back("loss_scaler", pickle().object(std::move(parts)));
    entries->emplace_back("dynamic_loss_scale", pickle().boolean(model_.dynamic_scale));
    entries->emplace_back("overflow", pickle().boolean(false));
  }

  reference::GroupSizes sizes_;
  std::vector<std::vector<int>> groups_;
  const std::vector<reference::RankBuffers>& states_;
};

}  // namespace

void write_source(Storage& storage, const std::string& folder, const Model& model, const Job& job) {
  CHECK(job.stage >= 1, "a source of stage 1, 2 or 3");
  std::vector<FileBlueprint> files;
  for (int rank = 0; rank < job.tensor && model.layers > 0; ++rank) {
    const Model shard = shard_of(model, rank, job.tensor);
    for (int layer = 0; layer + 1 < model.layers; ++layer)  // the last: a tied module, or none
      files.push_back(LayerFile(shard, job, 0).run(layer));
  }
  for (int mp = 0; mp < job.mp_ranks(); ++mp) {
    const Model part = part_of(model, job, mp);
    std::vector<reference::RankBuffers> states;
    for (int state = -1; state < static_cast<int>(model.states.size()); ++state) {
      states.push_back(reference::partition(whole_state(part, state), form_of(part, job),
                                            poison(state_dtype(part, state))));
    }
    for (int rank = 0; rank < job.ranks(); ++rank) {
      if (rank == 0 || job.stage == 3) files.push_back(ModelFile(part, job, rank).run());
      files.push_back(OptimFile(part, job, rank, states).run());
    }
  }
  write_folder(storage, folder, std::move(files));
}

void write_param_order(Storage& storage, const std::string& path, const Model& model) {
  std::string text;
  for (const std::vector<int>& group : optimizer_groups(model)) {
    for (int number : group) text += model.parameters[static_cast<size_t>(number)].name + "\n";
    text += "\n";
  }
  const std::unique_ptr<WritableFile> file = storage.create(path);
  file->write_at(0, std::as_bytes(std::span(text)));
  file->close();
}

}  // namespace isoshard::properties
