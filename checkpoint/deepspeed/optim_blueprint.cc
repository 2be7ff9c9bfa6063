// The partition file of a target rank (stage_1_and_2.py, bf16_optimizer.py and stage3.py,
// state_dict), and the optimizer entry of a stage-0 model file (fp16/unfused_optimizer.py).
#include <algorithm>

#include "checkpoint/deepspeed/experts.h"
#include "checkpoint/deepspeed/names.h"
#include "checkpoint/deepspeed/reader.h"
#include "checkpoint/deepspeed/reshard_target.h"
#include "core/check.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

// The source's dictionary that holds loss_scaler, overflow, clip_grad and the like.
NodeRef global_source(const ShardedState& state) {
  if (state.flavour == Flavour::kZero0) {
    const Fields model(state.document(state.model_files[0]));
    return {state.model_files[0], model.maybe(model.root(), "optimizer")};
  }
  const int file = state.optim_files[0];
  const Fields fields(state.document(file));
  const bool universal =
      state.flavour == Flavour::kUniversal12 || state.flavour == Flavour::kUniversal3;
  return {file, universal ? fields.root() : fields.need(fields.root(), "optimizer_state_dict")};
}

// Leaves of one state for the parameters of a buffer; the states must agree over all of them.
std::vector<int> leaves_of(const ReshardTarget& target, const TargetBuffer& buffer,
                           size_t state_number) {
  std::vector<int> leaves;
  const std::string& name =
      target.state.leaf(target.parameter(buffer.parameters[0]).states[state_number]).state;
  for (int number : buffer.parameters) {
    const int found = target.state.state_leaf(target.parameter(number), name);
    if (found < 0) {
      throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                            .what = "A parameter lacks a state that others of its group have; one "
                                    "flat buffer cannot hold that.",
                            .file = target.state.folder,
                            .entry = quote(target.parameter(number).name),
                            .expected = name,
                            .found = "absent",
                            .next = "reshard to a stage that keeps states by parameter (stage=0)"});
    }
    leaves.push_back(found);
  }
  return leaves;
}

class OptimWriter {
 public:
  OptimWriter(ReshardTarget* target, TorchBuilder* builder, TargetRank rank)
      : target_(*target),
        state_(target->state),
        builder_(*builder),
        pickle_(builder->pickle),
        rank_(rank),
        buffers_(buffers_of(*target, rank)),
        global_(global_source(state_)) {}

  NodeId file_root() {
    std::vector<std::pair<std::string, NodeId>> entries = {
        {"optimizer_state_dict", target_.stage == 3 ? stage3() : stage12()},
        {"ds_config", target_config(&builder_, target_)},
        {"ds_version", pickle_.string(state_.version)}};
    add_folding(&builder_, target_, rank_, &entries);
    return builder_.dict(std::move(entries));
  }

  // What ds_to_universal keeps of a stage-1 optimizer_state_dict: no partitions, zero paddings.
  NodeId global_state() {
    std::vector<std::pair<std::string, NodeId>> entries;
    add_scaler(&entries);
    std::vector<NodeId> paddings, alignments, counts;
    for (const TargetBuffer* buffer : buffers_) {
      paddings.push_back(pickle_.integer(0));
      alignments.push_back(
          pickle_.list(std::vector<NodeId>(buffer->parameters.size(), pickle_.integer(0))));
      counts.push_back(pickle_.integer(target_.ranks));
    }
    entries.emplace_back("clip_grad", clip_grad());
    entries.emplace_back("zero_stage", stage_enum());
    entries.emplace_back("group_paddings", pickle_.list(std::move(paddings)));
    if (target_.writes_alignment)
      entries.emplace_back("param_alignment_paddings", pickle_.list(std::move(alignments)));
    entries.emplace_back("partition_count", pickle_.list(std::move(counts)));
    entries.emplace_back("ds_version", pickle_.string(state_.version));
    entries.emplace_back("param_groups", param_groups());
    return builder_.dict(std::move(entries));
  }

  NodeId stage0() {
    if (target_.partitioned()) return stage12();
    skip("clip_grad");
    skip("overflow");
    const NodeId plain =
        builder_.dict({{"state", states_by_parameter()}, {"param_groups", param_groups()}});
    const bool masters = std::any_of(
        state_.parameters.begin(), state_.parameters.end(), [&](const ParameterState& p) {
          return p.group >= 0 && state_.leaf(p.weight).dtype != p.model_dtype;
        });
    if (!masters) return plain;
    std::vector<std::pair<std::string, NodeId>> entries = {
        {"dynamic_loss_scale", dynamic()}, {"cur_scale", scale()}, {"cur_iter", iteration()}};
    for (const char* key : {"last_overflow_iter", "scale_factor", "scale_window"}) {
      if (const NodeId value = scaler_field(key); value != kNoNode)
        entries.emplace_back(key, value);
    }
    entries.emplace_back("optimizer_state_dict", plain);
    entries.emplace_back("fp32_groups", masters_by_parameter());
    return builder_.dict(std::move(entries));
  }

 private:
  NodeId stage12() {
    std::vector<NodeId> masters, paddings, alignments, counts, slices;
    for (const TargetBuffer* each : buffers_) {
      const TargetBuffer& buffer = *each;
      const int rank = rank_in(target_, buffer, rank_);
      const FlatSizes sizes{buffer.partition * buffer.ranks, buffer.partition};
      const int64_t padding = target_.bf16_optimizer
                                  ? bf16_partition_padding(buffer.total, sizes, buffer.ranks, rank)
                                  : partition_padding(buffer.total, buffer.partition, rank);
      const int64_t length = target_.bf16_optimizer ? buffer.partition : buffer.partition - padding;
      masters.push_back(master(buffer, length));
      paddings.push_back(pickle_.integer(padding));
      std::vector<NodeId> alignment;
      for (int64_t elements : buffer.alignment) alignment.push_back(pickle_.integer(elements));
      alignments.push_back(pickle_.list(std::move(alignment)));
      counts.push_back(pickle_.integer(buffer.ranks));
      slices.push_back(slice_map(buffer));
    }
    std::vector<std::pair<std::string, NodeId>> entries;
    if (!target_.bf16_optimizer) add_scaler(&entries);
    entries.emplace_back("clip_grad", clip_grad());
    entries.emplace_back("base_optimizer_state", builder_.dict({{"state", states_by_buffer()},
                                                                {"param_groups", param_groups()}}));
    entries.emplace_back("single_partition_of_fp32_groups", pickle_.list(std::move(masters)));
    if (!target_.bf16_optimizer) entries.emplace_back("zero_stage", stage_enum());
    entries.emplace_back("group_paddings", pickle_.list(std::move(paddings)));
    if (target_.writes_alignment && !target_.bf16_optimizer)
      entries.emplace_back("param_alignment_paddings", pickle_.list(std::move(alignments)));
    entries.emplace_back("partition_count", pickle_.list(std::move(counts)));
    entries.emplace_back("ds_version", pickle_.string(state_.version));
    entries.emplace_back("param_slice_mappings", pickle_.list(std::move(slices)));
    return builder_.dict(std::move(entries));
  }

  NodeId stage3() {
    skip("clip_grad");
    std::vector<std::pair<std::string, NodeId>> entries = {{"zero_stage", stage_enum()}};
    add_scaler(&entries);
    entries.emplace_back("partition_count", pickle_.integer(target_.ranks));
    if (std::ranges::count(target_.expert_groups, true) > 0)
      entries.emplace_back("ds_zero_partition_groups", partition_groups());
    entries.emplace_back("optimizer_state_dict", builder_.dict({{"state", states_by_buffer()},
                                                                {"param_groups", param_groups()}}));
    std::vector<NodeId> flats;
    for (const TargetBuffer* buffer : buffers_) flats.push_back(master(*buffer, buffer->partition));
    entries.emplace_back("fp32_flat_groups", pickle_.list(std::move(flats)));
    return builder_.dict(std::move(entries));
  }

  // Who shares in each sub-group; experts have partition groups of their own.
  NodeId partition_groups() {
    std::vector<NodeId> groups;
    for (size_t k = 0; k < buffers_.size(); ++k) {
      const TargetBuffer& buffer = *buffers_[k];
      std::vector<NodeId> ranks;
      for (int member = 0; member < target_.ranks && !buffer.experts; ++member)
        ranks.push_back(pickle_.integer(member));
      if (buffer.experts) {
        for (int member : target_.expert_partitions[static_cast<size_t>(buffer.shard)])
          ranks.push_back(pickle_.integer(member));
      }
      const std::string group =
          buffer.experts ? "ep_size_" + std::to_string(target_.topology.expert) : "replicated";
      groups.push_back(builder_.dict(
          {{"sub_group", pickle_.integer(static_cast<int64_t>(k))},
           {"partition_count", pickle_.integer(buffer.ranks)},
           {"partition_rank", pickle_.integer(rank_in(target_, buffer, rank_))},
           {"partition_ranks", pickle_.list(std::move(ranks))},
           {"families",
            pickle_.list({pickle_.string(buffer.experts ? "autoep_expert" : "replicated")})},
           {"group_names", pickle_.list({pickle_.string(group)})}}));
    }
    return pickle_.list(std::move(groups));
  }

  // The padding behind `length` stays in the storage and out of the tensor, as DeepSpeed saves it.
  NodeId master(const TargetBuffer& buffer, int64_t length) {
    std::vector<int> leaves;
    for (int number : buffer.parameters) leaves.push_back(target_.parameter(number).weight);
    const int storage = builder_.add_storage(rank_fill(
        target_, buffer, rank_in(target_, buffer, rank_), leaves, state_.leaf(leaves.at(0)).dtype));
    const TorchBuilder::TensorSpec spec{
        .shape = {length}, .storage = storage, .requires_grad = true};
    if (target_.stage != 3) return builder_.tensor(spec);
    return builder_.tensor_with_attribute(spec, "ds_id", ds_id(buffer));
  }

  // Parameters are numbered in creation order, frozen ones included, tied ones once.
  std::string ds_id(const TargetBuffer& buffer) const {
    const auto number_of = [&](int parameter) {
      const auto found = target_.creation_numbers.find(target_.parameter(parameter).name);
      return std::to_string(found == target_.creation_numbers.end() ? 0 : found->second);
    };
    return number_of(buffer.parameters.front()) + "_" + number_of(buffer.parameters.back());
  }

  NodeId slice_map(const TargetBuffer& buffer) {
    const int rank = rank_in(target_, buffer, rank_);
    std::vector<NodeId> items;
    for (size_t i = 0; i < buffer.parameters.size(); ++i) {
      if (buffer.layouts[i].numel == 0) continue;
      if (const RankFragment f = fragment_on(buffer.layouts[i], rank); f.count > 0) {
        ObjectParts parts;
        parts.newobj = true;
        parts.callable = pickle_.global("deepspeed.utils.tensor_fragment", "fragment_address");
        parts.args = pickle_.tuple({});
        parts.state = builder_.dict(
            {{"numel", pickle_.integer(f.count)}, {"start", pickle_.integer(f.offset_local)}});
        items.push_back(pickle_.string(target_.name_of(buffer.parameters[i], buffer)));
        items.push_back(pickle_.object(std::move(parts)));
      }
    }
    return pickle_.ordered_dict(std::move(items));
  }

  NodeId states_by_buffer() {
    std::vector<NodeId> items;
    for (size_t k = 0; k < buffers_.size(); ++k) {
      const TargetBuffer& buffer = *buffers_[k];
      const ParameterState& first = target_.parameter(buffer.parameters[0]);
      if (first.states.empty() && first.scalars.empty()) continue;
      std::vector<std::pair<std::string, NodeId>> entry;
      for (const Scalar& scalar : first.scalars)
        entry.emplace_back(scalar.name, agreed_scalar(buffer, scalar));
      for (size_t s = 0; s < first.states.size(); ++s) {
        const Leaf& leaf = state_.leaf(first.states[s]);
        const int storage =
            builder_.add_storage(rank_fill(target_, buffer, rank_in(target_, buffer, rank_),
                                           leaves_of(target_, buffer, s), leaf.dtype));
        entry.emplace_back(leaf.state,
                           builder_.tensor({.shape = {buffer.partition}, .storage = storage}));
      }
      items.push_back(pickle_.integer(static_cast<int64_t>(k)));
      items.push_back(builder_.dict(std::move(entry)));
    }
    return pickle_.dict(std::move(items));
  }

  // One flat buffer has one step: all its parameters must stand at the same.
  NodeId agreed_scalar(const TargetBuffer& buffer, const Scalar& scalar) {
    const std::string value = scalar_text(state_, scalar.value);
    for (int number : buffer.parameters) {
      for (const Scalar& other : target_.parameter(number).scalars) {
        if (other.name != scalar.name || scalar_text(state_, other.value) == value) continue;
        throw Error(ErrorInfo{
            .code = ErrorCode::kMismatch,
            .what = "Parameters that will share one flat buffer stand at different values.",
            .file = state_.folder,
            .entry = quote(target_.parameter(number).name) + " " + scalar.name,
            .expected = value,
            .found = scalar_text(state_, other.value),
            .next = "keep a stage that holds them apart (stage=0), or more optimizer groups"});
      }
    }
    return builder_.copy_scalar(state_.document(scalar.value.file), scalar.value.file,
                                scalar.value.node);
  }

  NodeId states_by_parameter() {
    std::vector<NodeId> items;
    int64_t index = 0;
    for (size_t g = 0; g < state_.groups.size(); ++g) {
      for (int number : own(g)) {
        const ParameterState& parameter = target_.parameter(number);
        std::vector<std::pair<std::string, NodeId>> entry;
        for (const Scalar& scalar : parameter.scalars) {
          entry.emplace_back(scalar.name,
                             builder_.copy_scalar(state_.document(scalar.value.file),
                                                  scalar.value.file, scalar.value.node));
        }
        for (int leaf : parameter.states)
          entry.emplace_back(state_.leaf(leaf).state, whole_tensor(number, leaf, false));
        const int64_t key = index++;
        if (entry.empty()) continue;
        items.push_back(pickle_.integer(key));
        items.push_back(builder_.dict(std::move(entry)));
      }
    }
    return pickle_.dict(std::move(items));
  }

  NodeId masters_by_parameter() {
    std::vector<NodeId> groups;
    for (size_t g = 0; g < state_.groups.size(); ++g) {
      std::vector<NodeId> masters;
      for (int number : own(g))
        masters.push_back(whole_tensor(number, target_.parameter(number).weight,
                                       /*requires_grad=*/target_.experts == nullptr));
      groups.push_back(pickle_.list(std::move(masters)));
    }
    return pickle_.list(std::move(groups));
  }

  // Stage 0: the parameters of a group that this rank has, all but other ranks' native experts.
  std::vector<int> own(size_t group) const {
    std::vector<int> numbers;
    for (int number : state_.groups[group].parameters) {
      if (!target_.is_expert(number) || target_.holds_expert(expert_rank(), number))
        numbers.push_back(number);
    }
    return numbers;
  }

  int expert_rank() const { return expert_rank_of(target_, rank_).expert; }

  // This tensor- or expert-parallel rank's part of a leaf of a parameter.
  NodeId whole_tensor(int parameter, int number, bool requires_grad) {
    const Leaf& leaf = state_.leaf(number);
    const int shard = target_.is_expert(parameter) ? expert_rank() : rank_.mp;
    const Shape shape = target_.shard_shape(parameter, shard);
    StorageFill fill{
        .dtype = leaf.dtype, .numel = numel(shape), .runs = {}, .copy = {}, .literal = {}};
    target_.add_runs(&fill, parameter, shard, {number, 0, fill.numel, 0});
    return builder_.tensor({.shape = shape,
                            .storage = builder_.add_storage(std::move(fill)),
                            .requires_grad = requires_grad});
  }

  // Hyper-parameters of the source; `params` numbers what state is keyed by.
  NodeId param_groups() {
    std::vector<NodeId> groups;
    int64_t index = 0;
    for (size_t g = 0; g < state_.groups.size(); ++g) {
      std::vector<NodeId> numbers;
      if (!target_.partitioned()) {
        for (size_t i = 0; i < own(g).size(); ++i) numbers.push_back(pickle_.integer(index++));
      } else {
        for (size_t k = 0; k < buffers_.size(); ++k) {
          if (buffers_[k]->group == static_cast<int>(g))
            numbers.push_back(pickle_.integer(static_cast<int64_t>(k)));
        }
      }
      MappingCopy copy(&builder_, state_, state_.groups[g].hyper);
      copy.set("params", pickle_.list(std::move(numbers)));
      const NodeRef hyper = state_.groups[g].hyper;
      if (target_.expert_groups[g] &&
          is_group_of_experts(Fields(state_.document(hyper.file)), hyper.node))
        copy.set_if_present("name",
                            pickle_.string("ep_size_" + std::to_string(target_.topology.expert)));
      groups.push_back(copy.finish());
    }
    return pickle_.list(std::move(groups));
  }

  NodeId stage_enum() {
    return pickle_.reduce("deepspeed.runtime.zero.config", "ZeroStageEnum",
                          {pickle_.integer(target_.stage)});
  }

  NodeId source_value(const char* key) {
    if (!global_.present()) return kNoNode;
    const TorchFile& document = state_.document(global_.file);
    const NodeId value = document.pickle().find(global_.node, key);
    return value == kNoNode ? kNoNode : builder_.copy(document, global_.file, value);
  }

  // A field of the loss scaler, from the object (stages ≥ 1) or from stage 0's own keys.
  NodeId scaler_field(const char* key) {
    if (!global_.present()) return kNoNode;
    const Fields fields(state_.document(global_.file));
    NodeId holder = fields.state_of(fields.pickle().find(global_.node, "loss_scaler"));
    if (holder == kNoNode) holder = global_.node;
    const NodeId value = fields.pickle().find(holder, key);
    return value == kNoNode ? kNoNode : builder_.copy(fields.document(), global_.file, value);
  }

  NodeId dynamic() {
    const NodeId found = source_value("dynamic_loss_scale");
    return found != kNoNode ? found : pickle_.boolean(false);
  }
  NodeId scale() {
    const NodeId found = scaler_field("cur_scale");
    return found != kNoNode ? found : pickle_.real(1.0);
  }
  NodeId iteration() {
    const NodeId found = scaler_field("cur_iter");
    if (found != kNoNode) return found;
    target_.synthesised.insert("optimizer.cur_iter: global_steps");
    const Fields model(state_.document(target_.model_file()));
    return pickle_.integer(model.integer(model.need(model.root(), "global_steps"), "global_steps"));
  }

  void add_scaler(std::vector<std::pair<std::string, NodeId>>* entries) {
    NodeId scaler = source_value("loss_scaler");
    if (scaler == kNoNode) scaler = made_scaler();
    entries->emplace_back("loss_scaler", scaler);
    entries->emplace_back("dynamic_loss_scale", dynamic());
    NodeId overflow = source_value("overflow");
    if (overflow == kNoNode) {
      target_.synthesised.insert("overflow: False");
      overflow = pickle_.boolean(false);
    }
    entries->emplace_back("overflow", overflow);
  }

  // deepspeed/runtime/fp16/loss_scaler.py: static, or dynamic with the fields stage 0 keeps.
  NodeId made_scaler() {
    const NodeId is_dynamic = dynamic();
    ObjectParts parts;
    parts.newobj = true;
    parts.args = pickle_.tuple({});
    std::vector<std::pair<std::string, NodeId>> fields = {{"cur_scale", scale()},
                                                          {"dynamic", is_dynamic}};
    if (pickle_.integer_value(is_dynamic) != 0) {
      target_.synthesised.insert(
          "loss_scaler: min_scale, hysteresis and dtype, DeepSpeed's defaults");
      const auto add = [&](const char* key, NodeId otherwise) {
        const NodeId found = scaler_field(key);
        fields.emplace_back(key, found != kNoNode ? found : otherwise);
      };
      add("cur_iter", pickle_.integer(0));
      add("last_overflow_iter", pickle_.integer(-1));
      add("scale_factor", pickle_.real(2.0));
      add("scale_window", pickle_.integer(1000));
      add("min_scale", pickle_.integer(1));
      add("delayed_shift", pickle_.integer(2));
      add("cur_hysteresis", pickle_.integer(2));
      add("consecutive_hysteresis", pickle_.boolean(false));
      add("raise_error_at_min_scale", pickle_.boolean(true));
      add("dtype", pickle_.global("torch", "float16"));
      parts.callable = pickle_.global("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler");
    } else {
      target_.synthesised.insert(
          "loss_scaler: LossScaler with the source's scale, 1.0 if it has none");
      parts.callable = pickle_.global("deepspeed.runtime.fp16.loss_scaler", "LossScaler");
    }
    parts.state = builder_.dict(std::move(fields));
    return pickle_.object(std::move(parts));
  }

  void skip(const char* key) {
    if (source_value(key) == kNoNode) return;
    target_.skipped.insert(std::string(key) + ": stage " + std::to_string(target_.stage) +
                           " has no place for it");
  }

  NodeId clip_grad() {
    if (const NodeId found = source_value("clip_grad"); found != kNoNode) return found;
    target_.synthesised.insert(
        "clip_grad: gradient_clipping of ds_config, or the version's default");
    const Fields model(state_.document(target_.model_file()));
    const NodeId config = model.maybe(model.root(), "ds_config");
    const NodeId value = config == kNoNode ? kNoNode : model.maybe(config, "gradient_clipping");
    if (value != kNoNode) return builder_.copy(model.document(), target_.model_file(), value);
    return pickle_.real(target_.writes_alignment ? 1.0 : 0.0);
  }

  ReshardTarget& target_;
  const ShardedState& state_;
  TorchBuilder& builder_;
  Pickle& pickle_;
  TargetRank rank_;
  std::vector<const TargetBuffer*> buffers_;
  NodeRef global_;
};

}  // namespace

FileBlueprint optim_blueprint(ReshardTarget* target, TargetRank rank) {
  TorchBuilder builder;
  const NodeId root = OptimWriter(target, &builder, rank).file_root();
  return builder.finish(optim_file_name(target->prefix, rank.zero, rank.mp), root);
}

FileBlueprint global_state_blueprint(ReshardTarget* target) {
  TorchBuilder builder;
  const NodeId root = OptimWriter(target, &builder, {}).global_state();
  return builder.finish("zero/optimizer_state.pt", root);
}

NodeId stage0_optimizer(ReshardTarget* target, TorchBuilder* builder, int mp) {
  return OptimWriter(target, builder, {mp, 0}).stage0();
}

FileBlueprint stage0_blueprint(ReshardTarget* target, int expert_rank) {
  TorchBuilder builder;
  const int first = target->expert_partitions.at(static_cast<size_t>(expert_rank)).at(0);
  const NodeId optimizer = OptimWriter(target, &builder, {0, first}).stage0();
  return builder.finish(expert_optim_file_name(expert_rank),
                        builder.dict({{"optimizer", optimizer}}));
}

}  // namespace isoshard::checkpoint
