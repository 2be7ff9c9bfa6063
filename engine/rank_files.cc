// See rank_files.h.
#include "engine/rank_files.h"

#include <algorithm>
#include <map>

#include "checkpoint/deepspeed/names.h"
#include "core/error.h"
#include "core/zero_rules.h"
#include "engine/pickled.h"

namespace isoshard::engine {
namespace {

using checkpoint::FileBlueprint;
using checkpoint::NodeId;
using checkpoint::ObjectParts;
using checkpoint::TorchBuilder;
using Entries = std::vector<std::pair<std::string, NodeId>>;

class RankWriter {
 public:
  RankWriter(const TrainingState& state, const RankPlace& place, const SaveContent& content)
      : state_(state), place_(place), content_(content) {}

 protected:
  checkpoint::Pickle& pickle() { return builder_.pickle; }
  int ranks() const { return place_.topology.zero_ranks(); }
  const TrainedParameter& parameter(int number) const {
    return state_.parameters[static_cast<size_t>(number)];
  }
  NodeId integers(const std::vector<int64_t>& values) {
    std::vector<NodeId> items;
    for (const int64_t value : values) items.push_back(pickle().integer(value));
    return pickle().list(std::move(items));
  }
  // Of the parameters that the rank holds elements of: AutoTP leaves ranks without heads empty.
  std::vector<int> owned(const TrainedGroup& group) const {
    std::vector<int> list;
    for (const int number : group.parameters) {
      if (numel(parameter(number).shape) > 0) list.push_back(number);
    }
    return list;
  }
  int64_t total(const TrainedGroup& group) const {
    int64_t sum = 0;
    for (const int number : group.parameters) sum += numel(parameter(number).shape);
    return sum;
  }
  NodeId tensor(std::span<const float> values, const Shape& shape, DType dtype) {
    return builder_.tensor({.shape = shape, .storage = value_storage(&builder_, values, dtype)});
  }
  NodeId step_tensor() {
    const float steps = static_cast<float>(state_.counters.optimizer_steps);
    return tensor({&steps, 1}, {}, DType::kFloat32);
  }
  bool stepped() const { return state_.counters.optimizer_steps > 0; }

  NodeId param_groups(const std::vector<std::vector<int64_t>>& members) {
    std::vector<NodeId> groups;
    for (size_t g = 0; g < state_.groups.size(); ++g) {
      Entries entries;
      for (const auto& [key, setting] : state_.groups[g].settings) {
        entries.emplace_back(key, setting_node(&builder_, setting));
      }
      entries.emplace_back("params", integers(members[g]));
      groups.push_back(builder_.dict(std::move(entries)));
    }
    return pickle().list(std::move(groups));
  }

  const TrainingState& state_;
  const RankPlace& place_;
  const SaveContent& content_;
  TorchBuilder builder_;
};

class ModelFile : public RankWriter {
 public:
  using RankWriter::RankWriter;

  FileBlueprint run() {
    const bool sharded = state_.stage > 0, frozen = state_.stage >= 2;
    const TrainingCounters& counters = state_.counters;
    const Topology& t = place_.topology;
    const NodeId modules = module();
    Entries root = {
        {"module", modules},
        {"buffer_names", pickle().list({})},
        {"optimizer", sharded ? pickle().none() : stage0_optimizer()},
        {"param_shapes", sharded ? param_shapes() : pickle().none()},
        {"frozen_param_shapes", frozen ? pickle().ordered_dict({}) : pickle().none()},
        {"shared_params", sharded ? shared_params() : pickle().none()},
        {"frozen_param_fragments", frozen ? pickle().ordered_dict({}) : pickle().none()},
        {"lr_scheduler", scheduler()},
        {"data_sampler", pickle().none()},
        {"random_ltd", pickle().none()},
        {"skipped_steps", pickle().integer(counters.skipped_steps)},
        {"global_steps", pickle().integer(counters.steps)},
        {"global_samples", pickle().integer(counters.samples)},
        {"dp_world_size", pickle().integer(ranks())},
        {"mp_world_size", pickle().integer(t.tensor)},
        // The Ulysses mpu has sp for tp here (docs/deepspeed_errata.md); this is what is meant.
        {"checkpoint_parallel_dimensions",
         builder_.dict(
             {{"pp_degree", pickle().integer(1)}, {"tp_degree", pickle().integer(t.tensor)}})},
        {"ds_config", json_node(&builder_, content_.config)},
        {"ds_version", pickle().string(content_.version)}};
    if (t.tensor > 1) {
      root.emplace_back("universal_checkpoint_info", split_info_node(&builder_, state_, t.tensor));
    }
    merge_client_state(&root);
    const std::string name = state_.stage == 3 ? checkpoint::model_file_name_of_rank(
                                                     place_.zero_rank(), place_.mp_rank())
                                               : checkpoint::model_file_name(place_.mp_rank());
    return builder_.finish(name, builder_.dict(std::move(root)));
  }

 private:
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
    if (state_.stage == 1 || state_.stage == 2) lay_out_groups();
    std::vector<NodeId> items;
    std::map<std::string, NodeId> by_name;
    for (size_t i = 0; i < state_.parameters.size(); ++i) {
      const TrainedParameter& p = state_.parameters[i];
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
      items.push_back(pickle().string(p.name));
      items.push_back(node);
      for (const auto& [alias, name] : state_.aliases) {
        if (name == p.name) by_name[alias] = builder_.tensor(places_.at(static_cast<int>(i)));
      }
    }
    for (const auto& [alias, node] : by_name) {
      items.push_back(pickle().string(alias));
      items.push_back(node);
    }
    return pickle().ordered_dict(std::move(items));
  }

  NodeId param_shapes() {
    std::vector<NodeId> groups;
    for (const TrainedGroup& group : state_.groups) {
      std::vector<NodeId> items;
      for (const int number : owned(group)) {
        items.push_back(pickle().string(parameter(number).name));
        items.push_back(builder_.size_node(parameter(number).shape));
      }
      groups.push_back(pickle().ordered_dict(std::move(items)));
    }
    return pickle().list(std::move(groups));
  }

  // Global rank 0 alone fills it.
  NodeId shared_params() {
    Entries entries;
    for (const auto& [alias, name] : state_.aliases) {
      if (place_.zero_rank() == 0 && place_.mp_rank() == 0) {
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

  // The torch optimizer's own form, and around it what FP16_UnfusedOptimizer adds where parameters
  // have masters of their own.
  NodeId stage0_optimizer() {
    std::vector<NodeId> states, masters;
    std::vector<std::vector<int64_t>> members;
    int64_t number = 0;
    for (const TrainedGroup& group : state_.groups) {
      members.emplace_back();
      std::vector<NodeId> group_masters;
      for (const BufferPiece& piece : group.pieces) {
        const Shape& shape = parameter(piece.parameter).shape;
        const auto part = [&](const std::vector<float>& values) {
          return std::span(values).subspan(static_cast<size_t>(piece.at),
                                           static_cast<size_t>(piece.count));
        };
        if (stepped()) {
          Entries entry;
          if (state_.counts_steps) entry.emplace_back("step", step_tensor());
          for (const auto& [name, values] : group.states) {
            entry.emplace_back(name, tensor(part(values), shape, DType::kFloat32));
          }
          states.push_back(pickle().integer(number));
          states.push_back(builder_.dict(std::move(entry)));
        }
        if (state_.dtype != DType::kFloat32) {  // otherwise the parameters are the masters
          const int storage = value_storage(&builder_, part(group.master), DType::kFloat32);
          group_masters.push_back(
              builder_.tensor({.shape = shape, .storage = storage, .requires_grad = true}));
        }
        members.back().push_back(number++);
      }
      masters.push_back(pickle().list(std::move(group_masters)));
    }
    const NodeId plain = builder_.dict(
        {{"state", pickle().dict(std::move(states))}, {"param_groups", param_groups(members)}});
    if (state_.dtype == DType::kFloat32) return plain;
    const LossScale& scale = state_.loss_scale;
    Entries entries = {{"dynamic_loss_scale", pickle().boolean(scale.dynamic)},
                       {"cur_scale", pickle().real(scale.scale)},
                       {"cur_iter", pickle().integer(state_.counters.steps)}};
    if (scale.dynamic) {
      entries.emplace_back("last_overflow_iter", pickle().integer(scale.last_overflow));
      entries.emplace_back("scale_factor", pickle().real(2.0));
      entries.emplace_back("scale_window", pickle().integer(scale.window));
    }
    entries.emplace_back("optimizer_state_dict", plain);
    entries.emplace_back("fp32_groups", pickle().list(std::move(masters)));
    return builder_.dict(std::move(entries));
  }

  std::map<int, TorchBuilder::TensorSpec> places_;
};

class OptimFile : public RankWriter {
 public:
  using RankWriter::RankWriter;

  FileBlueprint run() {
    const NodeId root =
        builder_.dict({{"optimizer_state_dict", state_.stage == 3 ? stage3() : stage12()},
                       {"ds_config", json_node(&builder_, content_.config)},
                       {"ds_version", pickle().string(content_.version)}});
    const std::string prefix = state_.dtype == DType::kBFloat16 ? "bf16_" : "";
    return builder_.finish(
        checkpoint::optim_file_name(prefix, place_.zero_rank(), place_.mp_rank()), root);
  }

 private:
  NodeId stage12() {
    std::vector<int64_t> paddings, counts;
    std::vector<NodeId> masters, alignments, maps;
    for (const TrainedGroup& group : state_.groups) {
      const int64_t padding =
          partition_padding(total(group), group.buffer_size, place_.zero_rank());
      paddings.push_back(padding);
      counts.push_back(ranks());
      masters.push_back(
          builder_.tensor({.shape = {group.buffer_size - padding},
                           .storage = value_storage(&builder_, group.master, DType::kFloat32),
                           .requires_grad = true}));
      alignments.push_back(integers(std::vector<int64_t>(owned(group).size(), 0)));
      maps.push_back(slice_map(group));
    }
    Entries entries;
    add_scaler(&entries);
    entries.emplace_back("clip_grad", pickle().real(state_.clip));
    entries.emplace_back("base_optimizer_state", base_state());
    entries.emplace_back("single_partition_of_fp32_groups", pickle().list(std::move(masters)));
    entries.emplace_back("zero_stage", stage_enum());
    entries.emplace_back("group_paddings", integers(paddings));
    entries.emplace_back("param_alignment_paddings", pickle().list(std::move(alignments)));
    entries.emplace_back("partition_count", integers(counts));
    entries.emplace_back("ds_version", pickle().string(content_.version));
    entries.emplace_back("param_slice_mappings", pickle().list(std::move(maps)));
    return builder_.dict(std::move(entries));
  }

  NodeId stage3() {
    Entries entries = {{"zero_stage", stage_enum()}};
    add_scaler(&entries);
    entries.emplace_back("partition_count", pickle().integer(ranks()));
    entries.emplace_back("optimizer_state_dict", base_state());
    std::vector<NodeId> flats;
    for (const TrainedGroup& group : state_.groups) {
      const std::vector<int> list = owned(group);
      flats.push_back(builder_.tensor_with_attribute(
          {.shape = {group.buffer_size},
           .storage = value_storage(&builder_, group.master, DType::kFloat32),
           .requires_grad = true},
          "ds_id", std::to_string(list.front()) + "_" + std::to_string(list.back())));
    }
    entries.emplace_back("fp32_flat_groups", pickle().list(std::move(flats)));
    return builder_.dict(std::move(entries));
  }

  // Where this rank's pieces stand in its partition.
  NodeId slice_map(const TrainedGroup& group) {
    std::vector<NodeId> items;
    for (const BufferPiece& piece : group.pieces) {
      if (piece.count == 0) continue;
      ObjectParts parts;
      parts.newobj = true;
      parts.callable = pickle().global("deepspeed.utils.tensor_fragment", "fragment_address");
      parts.args = pickle().tuple({});
      parts.state = builder_.dict(
          {{"numel", pickle().integer(piece.count)}, {"start", pickle().integer(piece.at)}});
      items.push_back(pickle().string(parameter(piece.parameter).name));
      items.push_back(pickle().object(std::move(parts)));
    }
    return pickle().ordered_dict(std::move(items));
  }

  NodeId base_state() {
    std::vector<NodeId> states;
    std::vector<std::vector<int64_t>> members;
    for (size_t g = 0; g < state_.groups.size(); ++g) {
      const TrainedGroup& group = state_.groups[g];
      members.push_back({static_cast<int64_t>(g)});
      if (!stepped()) continue;
      Entries entry;
      if (state_.counts_steps) entry.emplace_back("step", step_tensor());
      for (const auto& [name, values] : group.states) {
        entry.emplace_back(name, tensor(values, {group.buffer_size}, DType::kFloat32));
      }
      states.push_back(pickle().integer(static_cast<int64_t>(g)));
      states.push_back(builder_.dict(std::move(entry)));
    }
    return builder_.dict(
        {{"state", pickle().dict(std::move(states))}, {"param_groups", param_groups(members)}});
  }

  NodeId stage_enum() {
    return pickle().reduce("deepspeed.runtime.zero.config", "ZeroStageEnum",
                           {pickle().integer(state_.stage)});
  }

  void add_scaler(Entries* entries) {
    const LossScale& scale = state_.loss_scale;
    Entries fields = {{"cur_scale", pickle().real(scale.scale)},
                      {"dynamic", pickle().boolean(scale.dynamic)}};
    if (scale.dynamic) {
      for (const auto& [key, value] :
           Entries{{"cur_iter", pickle().integer(scale.iteration)},
                   {"last_overflow_iter", pickle().integer(scale.last_overflow)},
                   {"scale_factor", pickle().real(2.0)},
                   {"scale_window", pickle().integer(scale.window)},
                   {"min_scale", pickle().real(scale.least)},
                   {"delayed_shift", pickle().integer(scale.hysteresis)},
                   {"cur_hysteresis", pickle().integer(scale.hysteresis_left)},
                   {"consecutive_hysteresis", pickle().boolean(false)},
                   {"raise_error_at_min_scale", pickle().boolean(false)},
                   {"dtype", pickle().global("torch", "float16")}}) {
        fields.emplace_back(key, value);
      }
    }
    ObjectParts parts;
    parts.newobj = true;
    parts.args = pickle().tuple({});
    parts.callable = pickle().global("deepspeed.runtime.fp16.loss_scaler",
                                     scale.dynamic ? "DynamicLossScaler" : "LossScaler");
    parts.state = builder_.dict(std::move(fields));
    entries->emplace_back("loss_scaler", pickle().object(std::move(parts)));
    entries->emplace_back("dynamic_loss_scale", pickle().boolean(scale.dynamic));
    entries->emplace_back("overflow", pickle().boolean(false));
  }
};

}  // namespace

std::string files_unsupported(const TrainingState& state, const Topology& topology) {
  if (topology.pipeline > 1) {
    return "the engine does not write the layer files of pipelines yet";
  }
  for (const TrainedGroup& group : state.groups) {
    if (group.expert) return "the engine does not write the files of experts yet";
  }
  if (topology.tensor > 1 && topology.sequence > 1) {
    return "DeepSpeed has no run of sequence- and tensor-parallel ranks together "
           "(ValueError, \"mutually exclusive\")";
  }
  if (state.stage == 0 && state.dtype == DType::kFloat16) {
    return "fp16 at stage 0 is FP16_Optimizer's form, of GPUs alone";
  }
  return "";
}

std::vector<FileBlueprint> rank_files(const TrainingState& state, const RankPlace& place,
                                      const SaveContent& content) {
  if (const std::string reason = files_unsupported(state, place.topology); !reason.empty()) {
    throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                          .what = "This run cannot be saved in DeepSpeed's files: " + reason + ".",
                          .entry = to_string(place.topology),
                          .next = "simulate it in memory"});
  }
  if (content.client_state.contains("checkpoint_parallel_dimensions")) {
    throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                          .what = "client_state contains a reserved key (DeepSpeed: KeyError).",
                          .entry = "checkpoint_parallel_dimensions",
                          .next = "give the entry another name"});
  }
  std::vector<FileBlueprint> files;
  if (state.stage == 3 || place.zero_rank() == 0) {
    files.push_back(ModelFile(state, place, content).run());
  }
  if (state.stage > 0) files.push_back(OptimFile(state, place, content).run());
  return files;
}

}  // namespace isoshard::engine
