// See universal_blueprint.h.
#include "checkpoint/deepspeed/universal_blueprint.h"

#include <algorithm>
#include <set>

#include "checkpoint/deepspeed/experts.h"
#include "checkpoint/deepspeed/fields.h"
#include "checkpoint/deepspeed/reshard_target.h"
#include "checkpoint/torch_builder.h"
#include "core/error.h"
#include "core/utf8.h"

namespace isoshard::checkpoint {
namespace {

// Expert-parallel ranks hold different numbers of experts, which the short metadata cannot say.
bool shared_unevenly(const ShardedState& state) {
  return std::ranges::any_of(state.splits, [](const TensorSplit& split) {
    return split.kind == SplitKind::kExperts &&
           std::ranges::any_of(split.map.ranks, [&](const RankMap& rank) {
             return rank.shard_shape[0] != split.map.ranks[0].shard_shape[0];
           });
  });
}

class UniversalWriter {
 public:
  UniversalWriter(const ShardedState& state, const UniversalOptions& options)
      : state_(state), options_(options), stage3_(state.flavour == Flavour::kZero3) {}

  TargetFiles run() {
    for (const GroupState& group : state_.groups) {
      for (int number : group.flat_order)
        add_parameter(state_.parameters[static_cast<size_t>(number)]);
    }
    if (!stage3_ && options_.extra_folders) add_extra_folders();
    TargetFiles result;
    if (state_.flavour == Flavour::kZero0) {
      Topology topology = state_.topology;  // param_shapes names all experts of native layers
      if (state_.expert_layout == ExpertLayout::kNative || shared_unevenly(state_))
        topology.expert = 1;
      ReshardTarget target = make_target(state_, topology, 1, {.experts_grouped = true});
      files_.push_back(global_state_blueprint(&target));
      add_model_files(&target);
      result.synthesised.assign(target.synthesised.begin(), target.synthesised.end());
    } else if (state_.stage == 0) {  // a pipeline's BF16_Optimizer, without param_shapes
      ReshardTarget target = make_target(state_, state_.topology, 1, {});
      files_.push_back(global_state_12());
      add_model_files(&target);
      target.synthesised.insert("param_shapes: param_slice_mappings, and the layers' files");
      result.synthesised.assign(target.synthesised.begin(), target.synthesised.end());
    } else {
      files_.push_back(stage3_ ? global_state_3() : global_state_12());
      if (options_.model_file) files_.push_back(*options_.model_file);
      for (int file : options_.model_file ? std::vector<int>() : state_.model_files)
        files_.push_back(has_experts() && !stage3_ ? expert_model_file(file) : copy_of(file));
    }
    check_paths();
    result.files = std::move(files_);
    return result;
  }

 private:
  void add_model_files(ReshardTarget* target) {
    for (int mp = 0; mp < state_.topology.tensor * state_.topology.pipeline; ++mp)
      files_.push_back(model_blueprint(target, {mp, 0}));
  }

  int add_leaf(TorchBuilder* builder, int number, DType dtype) const {
    return builder->add_storage(whole_fill(number, state_.leaf(number).size_elements(), dtype));
  }

  // {cat_dim: 0, param: tensor} or what the split's rule adds; stage 3 without tensor-parallel
  // ranks: the bare flat tensor.
  void add_state(const ParameterState& parameter, const std::string& file, int number) {
    const Leaf& leaf = state_.leaf(number);
    const bool bare = stage3_ && parameter.split < 0;
    TorchBuilder builder;
    const int storage = add_leaf(&builder, number, leaf.dtype);
    Shape shape = bare ? Shape{leaf.size_elements()} : leaf.shape;
    if (parameter.split >= 0) shape = converted_shape(state_.split_of(parameter));
    const NodeId tensor =
        builder.tensor({.shape = shape, .storage = storage, .requires_grad = leaf.requires_grad});
    NodeId root = tensor;
    const bool expert =
        parameter.split >= 0 && state_.split_of(parameter).kind == SplitKind::kExperts;
    if (expert) {
      root = builder.dict({{"param", tensor},
                           {"cat_dim", builder.pickle.integer(0)},
                           {"is_expert_param", builder.pickle.boolean(true)},
                           {"ep_num_experts", builder.pickle.integer(leaf.shape[0])}});
    } else if (!bare) {
      std::vector<std::pair<std::string, NodeId>> entries;
      if (parameter.split < 0)
        entries.emplace_back("cat_dim", builder.pickle.integer(0));
      else
        add_split_keys(state_.split_of(parameter), &builder, &entries);
      entries.emplace_back("param", tensor);
      root = builder.dict(std::move(entries));
    }
    files_.push_back(builder.finish("zero/" + parameter.name + "/" + file + ".pt", root));
  }

  // What merge_tp_slices adds for each of its rules; a recorded map adds nothing.
  void add_split_keys(const TensorSplit& split, TorchBuilder* builder,
                      std::vector<std::pair<std::string, NodeId>>* entries) const {
    const SplitKind kind = split.recorded ? SplitKind::kMapped : split.kind;
    if (kind == SplitKind::kColumn || kind == SplitKind::kRow || kind == SplitKind::kTwoSubParams)
      entries->emplace_back("cat_dim", builder->pickle.integer(kind == SplitKind::kRow ? 1 : 0));
    if (kind == SplitKind::kTwoSubParams)
      entries->emplace_back("param_n_sub_params", builder->pickle.integer(2));
    if (kind == SplitKind::kSubParams)
      entries->emplace_back("sub_param_shape", sub_param_shape(split, builder));
    if (split.vocabulary) entries->emplace_back("vocab_tensor", builder->pickle.boolean(true));
  }

  // deepspeed.checkpoint.universal_checkpoint.SubparamShape; a count becomes the widths it means.
  NodeId sub_param_shape(const TensorSplit& split, TorchBuilder* builder) const {
    const TorchFile& document = state_.document(split.sub_file);
    const Fields fields(document);
    Pickle& pickle = builder->pickle;
    const NodeId shape = fields.need(split.sub_entry, "shape");
    NodeId written = kNoNode;
    if (split.from_count) {
      std::vector<NodeId> extents;
      for (NodeId extent : fields.list(shape, "shape"))
        extents.push_back(pickle.integer(fields.integer(extent, "shape")));
      std::vector<NodeId> sizes;
      for (const std::vector<int64_t>& sub : split.widths)
        sizes.push_back(pickle.integer(total_width(sub)));
      extents[split.dim] = pickle.tuple(std::move(sizes));
      written = pickle.tuple(std::move(extents));
    } else {
      written = builder->copy(document, split.sub_file, shape);
    }
    const auto copy = [&](const char* key) {
      return builder->copy(document, split.sub_file, fields.need(split.sub_entry, key));
    };
    ObjectParts parts;
    parts.newobj = true;
    parts.callable = pickle.global("deepspeed.checkpoint.universal_checkpoint", "SubparamShape");
    parts.args = pickle.tuple({});
    parts.state = builder->dict({{"patterns", copy("patterns")},
                                 {"shape", written},
                                 {"partition_dim", copy("partition_dim")}});
    return pickle.object(std::move(parts));
  }

  void add_parameter(const ParameterState& parameter) {
    written_.insert(parameter.name);
    add_state(parameter, "fp32", parameter.weight);
    for (int number : parameter.states) add_state(parameter, state_.leaf(number).state, number);
    if (stage3_) return;  // the nested optimizer state keeps the steps
    for (const Scalar& scalar : parameter.scalars) {
      const TorchFile& document = state_.document(scalar.value.file);
      if (document.pickle().is_none(scalar.value.node)) continue;
      TorchBuilder builder;
      const NodeId root = builder.copy(document, scalar.value.file, scalar.value.node);
      files_.push_back(builder.finish("zero/" + parameter.name + "/" + scalar.name + ".pt", root));
    }
  }

  // Every other entry of the module as {param: fp32 tensor}, as DeepSpeed 0.19.8 adds them.
  void add_extra(const std::string& name, int number) {
    if (!written_.insert(name).second || number < 0) return;
    TorchBuilder builder;
    const int storage = add_leaf(&builder, number, DType::kFloat32);
    const NodeId tensor = builder.tensor({.shape = state_.leaf(number).shape, .storage = storage});
    files_.push_back(
        builder.finish("zero/" + name + "/fp32.pt", builder.dict({{"param", tensor}})));
  }

  void add_extra_folders() {
    for (const BufferState& buffer : state_.buffers) add_extra(buffer.name, buffer.leaf);
    for (const ParameterState& parameter : state_.parameters) {
      if (parameter.group < 0) add_extra(parameter.name, parameter.weight);
    }
    for (const Alias& alias : state_.aliases) add_extra(alias.name, alias.model_copy);
  }

  // Rank 0's optimizer_state_dict without its partitions, with param_groups.
  FileBlueprint global_state_12() const {
    const int file = state_.optim_files[0];
    const TorchFile& document = state_.document(file);
    const Fields fields(document);
    const Pickle& pickle = document.pickle();
    const NodeId optimizer = fields.need(fields.root(), "optimizer_state_dict");
    TorchBuilder builder;
    std::vector<NodeId> items;
    const std::vector<NodeId>& entries = pickle.entries(optimizer);
    for (size_t i = 0; i + 1 < entries.size(); i += 2) {
      const std::string key = fields.text(entries[i], "optimizer_state_dict key");
      if (key == "base_optimizer_state" || key == "param_slice_mappings" ||
          key == "single_partition_of_fp32_groups")
        continue;
      items.push_back(builder.pickle.string(key));
      if (key == "group_paddings") {
        std::vector<NodeId> zeros(state_.groups.size());
        for (NodeId& zero : zeros) zero = builder.pickle.integer(0);
        items.push_back(builder.pickle.list(std::move(zeros)));
      } else if (key == "param_alignment_paddings" && options_.plain_alignment) {
        std::vector<NodeId> groups;
        for (const GroupState& group : state_.groups)
          groups.push_back(builder.pickle.list(
              std::vector<NodeId>(group.flat_order.size(), builder.pickle.integer(0))));
        items.push_back(builder.pickle.list(std::move(groups)));
      } else if (key == "partition_count") {
        // Also for experts, whose partition group is smaller.
        const auto dp = static_cast<int64_t>(state_.topology.zero_ranks());
        std::vector<NodeId> counts(state_.groups.size());
        for (NodeId& count : counts) count = builder.pickle.integer(dp);
        items.push_back(builder.pickle.list(std::move(counts)));
      } else {
        items.push_back(builder.copy(document, file, entries[i + 1]));
      }
    }
    const NodeId groups =
        fields.need(fields.need(optimizer, "base_optimizer_state"), "param_groups");
    items.push_back(builder.pickle.string("param_groups"));
    const std::vector<NodeId>& listed = fields.list(groups, "param_groups");
    const bool own = std::ranges::equal(listed, state_.groups, [&](NodeId node, const auto& group) {
      return group.hyper.file == file && group.hyper.node == node;
    });
    items.push_back(own ? builder.copy(document, file, groups) : param_groups(&builder));
    return builder.finish("zero/optimizer_state.pt", builder.pickle.dict(std::move(items)));
  }

  // Where a migration has split groups anew.
  NodeId param_groups(TorchBuilder* builder) const {
    std::vector<NodeId> groups;
    for (const GroupState& group : state_.groups) {
      MappingCopy copy(builder, state_, group.hyper);
      const auto number = static_cast<int64_t>(groups.size());
      copy.set("params", builder->pickle.list({builder->pickle.integer(number)}));
      groups.push_back(copy.finish());
    }
    return builder->pickle.list(std::move(groups));
  }

  // Rank 0's whole optimizer_state_dict, its partitions included, with param_groups beside it.
  FileBlueprint global_state_3() const {
    const int file = state_.optim_files[0];
    const TorchFile& document = state_.document(file);
    const Fields fields(document);
    const NodeId optimizer = fields.need(fields.root(), "optimizer_state_dict");
    TorchBuilder builder;
    std::vector<NodeId> items;
    for (NodeId node : document.pickle().entries(optimizer))
      items.push_back(builder.copy(document, file, node));
    const NodeId groups =
        fields.need(fields.need(optimizer, "optimizer_state_dict"), "param_groups");
    items.push_back(builder.pickle.string("param_groups"));
    items.push_back(builder.copy(document, file, groups));
    return builder.finish("zero/optimizer_state.pt", builder.pickle.dict(std::move(items)));
  }

  bool has_experts() const { return state_.expert_layout != ExpertLayout::kNone; }

  // What the converter makes of a model file with experts. AutoEP: the layers' metadata in short.
  // Native MoE, which it refuses: param_shapes with all experts, as one expert-parallel rank has
  // them, so that no two experts share a name.
  FileBlueprint expert_model_file(int file) const {
    const TorchFile& document = state_.document(file);
    const Fields fields(document);
    TorchBuilder builder;
    MappingCopy root(&builder, state_, {file, fields.root()});
    if (state_.expert_layout == ExpertLayout::kAutoEp)
      root.set("universal_checkpoint_info", short_metadata(fields, file, &builder));
    else
      root.set("param_shapes", all_shapes(fields, &builder));
    return builder.finish(state_.files[static_cast<size_t>(file)].relative, root.finish());
  }

  NodeId short_metadata(const Fields& fields, int file, TorchBuilder* builder) const {
    Pickle& pickle = builder->pickle;
    std::vector<NodeId> layers;
    const NodeId list = autoep_layers(fields, fields.root());
    for (NodeId entry : fields.list(list, "ds_autoep_layers")) {
      std::vector<std::pair<std::string, NodeId>> fields_of;
      for (const char* key : {"moe_layer_id", "module_path", "expert_key_prefix", "num_experts",
                              "num_local_experts", "ep_size"})
        fields_of.emplace_back(key,
                               builder->copy(fields.document(), file, fields.need(entry, key)));
      layers.push_back(builder->dict(std::move(fields_of)));
    }
    const NodeId patterns = pickle.list({pickle.string("\\.experts\\.w[123]$")});
    const NodeId metadata = pickle.list(std::move(layers));
    const NodeId info = fields.maybe(fields.root(), "universal_checkpoint_info");
    if (info == kNoNode) {
      return builder->dict({{"universal_checkpoint_version", pickle.real(0.4)},
                            {"expert_parameter_patterns", patterns},
                            {"ds_autoep_layers", metadata}});
    }
    MappingCopy copy(builder, state_, {file, info});
    copy.set("expert_parameter_patterns", patterns);
    copy.set("ds_autoep_layers", metadata);
    return copy.finish();
  }

  NodeId all_shapes(const Fields& fields, TorchBuilder* builder) const {
    const std::vector<NodeId>& source =
        fields.list(fields.need(fields.root(), "param_shapes"), "param_shapes");
    Pickle& pickle = builder->pickle;
    std::vector<NodeId> groups;
    for (size_t g = 0; g < source.size(); ++g) {
      std::vector<NodeId> items;
      for (int number : state_.groups[g].flat_order) {
        const ParameterState& parameter = state_.parameters[static_cast<size_t>(number)];
        items.push_back(pickle.string(parameter.name));
        items.push_back(builder->tuple_node(parameter.shape));
      }
      groups.push_back(pickle.ordered_dict(std::move(items)));
    }
    return pickle.list(std::move(groups));
  }

  FileBlueprint copy_of(int file) const {
    const SourceFile& source = state_.files[static_cast<size_t>(file)];
    return whole_copy(source.relative, file, source.bytes().size_bytes());
  }

  // A name such as "a/fp32.pt" beside a parameter "a" would make one path file and folder.
  void check_paths() const {
    std::set<std::string> paths;
    for (const FileBlueprint& file : files_) paths.insert(file.path);
    for (const std::string& path : paths) {
      const std::string why = why_unsafe_name(path);
      bool clash = false;
      for (size_t slash = path.find('/'); slash != std::string::npos;
           slash = path.find('/', slash + 1)) {
        clash = clash || paths.count(path.substr(0, slash)) != 0;
      }
      if (why.empty() && !clash) continue;
      throw Error(
          ErrorInfo{.code = ErrorCode::kUnsupported,
                    .what = clash ? "Two parameter names would need one path as file and as folder."
                                  : "A parameter name cannot be a path: " + why + ".",
                    .file = state_.folder,
                    .entry = quote(path),
                    .expected = "names that make paths of their own under zero/",
                    .next = "rename the parameter in the model"});
    }
  }

  const ShardedState& state_;
  const UniversalOptions& options_;
  bool stage3_;
  std::vector<FileBlueprint> files_;
  std::set<std::string> written_;
};

// Elements [begin, begin + count) of the leaves laid one behind another.
std::vector<FileFragment> slice_of(const ShardedState& state, const std::vector<int>& leaves,
                                   int64_t begin, int64_t count) {
  std::vector<FileFragment> result;
  int64_t flat = 0;
  for (int number : leaves) {
    const Leaf& leaf = state.leaf(number);
    const int64_t from = std::max(begin, flat),
                  to = std::min(begin + count, flat + leaf.size_elements());
    if (from < to) append_fragments(leaf, from - flat, to - from, from - begin, &result);
    flat += leaf.size_elements();
  }
  return result;
}

}  // namespace

ShardedState as_deepspeed_believes(const ShardedState& state) {
  ShardedState believed = state;
  if (!state.round_robin) return believed;
  const Topology& t = state.topology;
  if (t.tensor > 1 || t.expert > 1 || t.pipeline > 1) {
    throw Error(ErrorInfo{
        .code = ErrorCode::kUnsupported,
        .what = "What DeepSpeed makes of round_robin_gradients over several mp ranks is not "
                "imitated.",
        .file = state.folder,
        .next = "leave --as-deepspeed out: the true slices are written"});
  }
  for (const GroupState& group : state.groups) {
    const size_t states =
        1 + state.parameters[static_cast<size_t>(group.flat_order.at(0))].states.size();
    for (size_t s = 0; s < states; ++s) {
      const auto leaf_of = [&](int number) {
        const ParameterState& parameter = state.parameters[static_cast<size_t>(number)];
        return s == 0 ? parameter.weight : parameter.states[s - 1];
      };
      std::vector<int> flat;
      for (int number : group.flat_order) flat.push_back(leaf_of(number));
      int64_t offset = 0;
      for (int number : group.parameters) {
        Leaf& leaf = believed.leaf(leaf_of(number));
        leaf.fragments = slice_of(state, flat, offset, leaf.size_elements());
        offset += leaf.size_elements();
      }
    }
  }
  return believed;
}

TargetFiles universal_blueprints(const ShardedState& state, const UniversalOptions& options) {
  if (state.flavour == Flavour::kZero3 && state.model_files.size() < state.optim_files.size()) {
    throw Error(ErrorInfo{.code = ErrorCode::kIncomplete,
                          .what = "The universal form of stage 3 holds every rank's model file, "
                                  "and some are missing.",
                          .file = state.folder,
                          .expected = std::to_string(state.optim_files.size()) + " files",
                          .found = std::to_string(state.model_files.size()),
                          .next = "isoshard reshard to the same topology makes them anew; convert "
                                  "its output"});
  }
  const bool convertible = state.flavour == Flavour::kZero0 || state.flavour == Flavour::kZero12 ||
                           state.flavour == Flavour::kBf16Optimizer ||
                           state.flavour == Flavour::kZero3;
  if (!convertible) {
    throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                          .what = "This source cannot be converted to universal.",
                          .file = state.folder,
                          .expected = "a ZeRO checkpoint",
                          .found = name(state.flavour)});
  }
  const bool folded = state.expert_layout != ExpertLayout::kNone && state.topology.tensor > 1;
  if (folded && !options.beyond_deepspeed) {
    throw Error(ErrorInfo{
        .code = ErrorCode::kUnsupported,
        .what = "AutoEP folded with AutoTP has no universal form of DeepSpeed's "
                "(NotImplementedError).",
        .file = state.folder,
        .entry = "folding",
        .found = to_string(state.topology),
        .next =
            "isoshard convert --to universal --beyond-deepspeed writes the form that a run with "
            "tp=1 has; or reshard --to tp=1"});
  }
  const auto frozen = std::find_if(state.parameters.begin(), state.parameters.end(),
                                   [](const ParameterState& p) { return p.group < 0; });
  if (state.pipeline.present() && (!state.buffers.empty() || frozen != state.parameters.end())) {
    throw Error(ErrorInfo{
        .code = ErrorCode::kUnsupported,
        .what = "The universal form of a pipeline has no place for buffers and frozen parameters "
                "(DeepSpeed drops them).",
        .file = state.folder,
        .entry = quote(state.buffers.empty() ? frozen->name : state.buffers[0].name),
        .next = "reshard --to pp=N keeps all of it; convert --to fp32 the weights"});
  }
  const bool uneven = state.stage != 0 && state.stage != 3 && shared_unevenly(state);
  if (!folded && !uneven) return UniversalWriter(state, options).run();
  Topology whole = state.topology;
  if (uneven) whole.expert = 1;
  whole.tensor = 1;
  whole.data = state.topology.data * state.topology.tensor;  // so that ep divides it
  ReshardTarget target = make_target(state, whole, state.stage, {.experts_grouped = true});
  UniversalOptions of_one_rank = options;
  of_one_rank.model_file = model_blueprint(&target, {});
  return UniversalWriter(state, of_one_rank).run();
}

}  // namespace isoshard::checkpoint
