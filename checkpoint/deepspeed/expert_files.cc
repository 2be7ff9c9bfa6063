// Experts of stages 1 and 2: partitions by expert-parallel rank, and one file an expert.
#include <algorithm>
#include <map>

#include "checkpoint/deepspeed/experts.h"
#include "checkpoint/deepspeed/merge.h"
#include "checkpoint/deepspeed/zero_files.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

// partition_count of a group, as rank 0's optimizer file records it.
int64_t partition_count(const ShardedState& state, size_t group) {
  const Fields f(state.document(state.optim_files[0]));
  const NodeId optimizer = f.need(f.root(), "optimizer_state_dict");
  if (state.stage == 3) {
    const NodeId entry = partition_group(f, optimizer, static_cast<int64_t>(group));
    const NodeId holder = entry == kNoNode ? optimizer : entry;
    return f.integer(f.need(holder, "partition_count"), "partition_count");
  }
  const std::vector<NodeId>& counts =
      f.list(f.need(optimizer, "partition_count"), "partition_count");
  if (group >= counts.size())
    f.fail("A group has no partition count.", "partition_count", std::to_string(group + 1),
           std::to_string(counts.size()));
  return f.integer(counts[group], "partition_count");
}

// Local experts of each MoE layer: how many numbers follow its path.
std::map<std::string, int64_t> local_experts(const ShardedState& state) {
  std::map<std::string, int64_t> counts;
  for (const ParameterState& parameter : state.parameters) {
    const auto number = ExpertInfo::expert_number(parameter.name);
    if (number) counts[number->first] = std::max(counts[number->first], number->second + 1);
  }
  return counts;
}

void name_globally(ShardedState* state, int rank) {
  const std::map<std::string, int64_t> counts = local_experts(*state);
  const auto rename = [&](std::string* name) {
    if (const auto number = ExpertInfo::expert_number(*name))
      *name = ExpertInfo::global_name(*name, rank, counts.at(number->first));
  };
  std::vector<ParameterState> parameters = state->parameters;
  for (ParameterState& parameter : parameters) rename(&parameter.name);
  for (Leaf& leaf : state->leaves) rename(&leaf.name);
  state->set_parameters(std::move(parameters));
}

void refuse_round_robin(const ShardedState& state, const ModelStates& model) {
  if (!state.round_robin) return;
  throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                        .what = "Experts under round_robin_gradients are not supported yet.",
                        .file = state.document(model.file).path(),
                        .entry = "ds_config zero_optimization round_robin_gradients",
                        .expected = "false",
                        .found = "true",
                        .next = "save again with round_robin_gradients off"});
}

bool is_partitioned(const Fields& f, NodeId layer) {
  return f.text(f.need(layer, "checkpoint_format"), "checkpoint_format") == "zero3_partitioned" &&
         f.integer(f.need(layer, "checkpoint_format_version"), "checkpoint_format_version") == 1;
}

// At stage 3 every rank's model file says which expert-parallel rank it is, and which replica.
void check_expert_ranks(const ShardedState& state, const ExpertInfo& first, int expert_rank,
                        const std::vector<int>& members, bool any_format) {
  for (size_t replica = 0; replica < members.size(); ++replica) {
    const int file = state.model_files[static_cast<size_t>(members[replica])];
    const Fields f(state.document(file));
    const std::vector<NodeId>& layers = f.list(autoep_layers(f, f.root()), "ds_autoep_layers");
    if (file != state.model_files[0] &&
        ExpertInfo(state, ModelStates{.file = file}).layers() != first.layers())
      f.fail(
          "Ranks disagree on the layers of experts or their placement (DeepSpeed: "
          "RuntimeError).",
          "ds_autoep_layers", "as in rank 0", "another");
    for (NodeId layer : layers) {
      const auto check = [&](const char* key, int64_t expected) {
        const int64_t found = f.integer(f.need(layer, key), key);
        if (found != expected)
          f.fail(
              "A rank's experts are not those of its place among the ranks (DeepSpeed: "
              "RuntimeError).",
              key, std::to_string(expected), std::to_string(found));
      };
      check("ep_rank", expert_rank);
      check("expert_data_parallel_rank", static_cast<int64_t>(replica));
      check("expert_data_parallel_world_size", static_cast<int64_t>(members.size()));
      if (!any_format && !is_partitioned(f, layer))
        f.fail(
            "AutoEP at stage 3 in another format than the partition-native one (DeepSpeed: "
            "NotImplementedError).",
            "checkpoint_format",
            "zero3_partitioned, version 1; or convert, reshard with "
            "--beyond-deepspeed",
            "another");
    }
  }
}

}  // namespace

ExpertGroups groups_of_experts(const ShardedState& state, const ModelStates& model,
                               const ExpertInfo& experts) {
  ExpertGroups groups{GroupMask(model.param_shapes.size(), false),
                      GroupMask(model.param_shapes.size(), false)};
  for (size_t g = 0; g < model.param_shapes.size(); ++g) {
    for (const auto& [name, shape] : model.param_shapes[g])
      (experts.is_expert(name) ? groups.expert : groups.dense)[g] = true;
    if (groups.dense[g] && groups.expert[g])
      Fields(state.document(model.file))
          .fail("An optimizer group holds experts and other parameters.", "param_shapes", "apart",
                "group " + std::to_string(g));
  }
  return groups;
}

void read_experts(ShardedState* state, const ModelStates& model, const ExpertInfo& experts,
                  bool stage3, bool any_format) {
  state->expert_layout = experts.autoep() ? ExpertLayout::kAutoEp : ExpertLayout::kNative;
  const auto [dense, expert] = groups_of_experts(*state, model, experts);
  size_t last = 0;
  for (size_t g = 0; g < expert.size(); ++g) {
    if (expert[g]) last = g;
  }
  if (stage3)
    read_zero3(state, model, dense);
  else
    read_zero12(state, model, dense);
  refuse_round_robin(*state, model);
  if (std::none_of(expert.begin(), expert.end(), [](bool e) { return e; })) return;
  const int dp = static_cast<int>(state->optim_files.size());
  const int ranks = experts.expert_ranks(dp, partition_count(*state, last));
  state->topology.expert = ranks;
  std::vector<MpPart> parts;
  for (int rank = 0; rank < ranks; ++rank) {
    const std::vector<int> members = experts.partition_ranks(rank, ranks, dp);
    if (stage3) check_expert_ranks(*state, experts, rank, members, any_format);
    MpPart part = lend_files(state, experts.of_rank(model, rank));
    part.state.model_files = state->model_files;
    for (int member : members)
      part.state.optim_files.push_back(state->optim_files[static_cast<size_t>(member)]);
    if (stage3)
      read_zero3_part(&part.state, part.model, expert, members);
    else
      read_zero12(&part.state, part.model, expert);
    state->files = std::move(part.state.files);
    if (!experts.autoep()) name_globally(&part.state, rank);
    parts.push_back(std::move(part));
  }
  if (experts.autoep()) {
    merge_expert_ranks(state, parts, experts);
  } else {
    join_native_ranks(state, parts);
  }
}

void join_native_ranks(ShardedState* whole, const std::vector<MpPart>& parts) {
  std::map<std::string, size_t> layers;  // by path, in order of appearance
  std::vector<std::pair<std::pair<size_t, int64_t>, ParameterState>> all;
  for (const MpPart& part : parts) {
    const int first = static_cast<int>(whole->leaves.size());
    whole->leaves.insert(whole->leaves.end(), part.state.leaves.begin(), part.state.leaves.end());
    for (ParameterState parameter : part.state.parameters) {
      if (parameter.weight >= 0) parameter.weight += first;
      if (parameter.model_copy >= 0) parameter.model_copy += first;
      for (int& leaf : parameter.states) leaf += first;
      const auto number = ExpertInfo::expert_number(parameter.name);
      const size_t layer = layers.try_emplace(number->first, layers.size()).first->second;
      all.emplace_back(std::pair(layer, number->second), std::move(parameter));
    }
    whole->stepped = whole->stepped || part.state.stepped;
  }
  std::stable_sort(all.begin(), all.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  for (auto& [place, parameter] : all) {
    const int number = static_cast<int>(whole->parameters.size());
    whole->parameters.push_back(std::move(parameter));
    whole->enlist(number);
  }
}

void refuse_missing_expert(const ShardedState& state, const std::string& name, size_t files) {
  throw Error(
      ErrorInfo{.code = ErrorCode::kIncomplete,
                .what = "An expert's file is missing (DeepSpeed: FileNotFoundError).",
                .file = state.folder,
                .entry = quote(name),
                .expected = "layer_<L>_expert_<X>_mp_rank_00_model_states.pt that holds it",
                .found = std::to_string(files) + " expert files without it",
                .next = "bring it from the node that wrote it, or use an older checkpoint"});
}

void give_expert_dtype(ShardedState* state, const ModelStates& model, const ExpertInfo& experts) {
  const Fields fields(state->document(model.file));
  std::optional<DType> dtype;
  for (const auto& [name, node] : model.module) {
    const ParameterState* parameter = state->find_parameter(name);
    if (!dtype && parameter != nullptr && parameter->group >= 0)
      dtype = fields.tensor(node, name).dtype;
  }
  if (!dtype) return;
  std::vector<ParameterState> parameters = state->parameters;
  for (ParameterState& parameter : parameters) {
    if (experts.is_expert(parameter.name)) parameter.model_dtype = *dtype;
  }
  state->set_parameters(std::move(parameters));
}

namespace {

using ExpertTensorsByName = std::map<std::string, std::pair<int, TensorView>>;

// Folded, with fewer expert-parallel than tensor-parallel ranks, an expert has a file of each rank
// that holds it; the others must equal the first.
void add_expert_tensor(ShardedState* state, int file, const std::string& name,
                       const TensorView& view, ExpertTensorsByName* tensors) {
  const auto [found, fresh] = tensors->emplace(name, std::pair(file, view));
  if (fresh) return;
  const int first = found->second.first;
  if (!is_folded(state->document(file)) || !is_folded(state->document(first)))
    refuse_second_file(*state, first, file);
  const Leaf one = file_leaf(state->document(first), first, found->second.second, name, "param");
  Leaf other = file_leaf(state->document(file), file, view, name, "another mp rank");
  if (one.shape != other.shape || one.dtype != other.dtype)
    Fields(state->document(file))
        .fail("Two files of one expert differ in shape or dtype.", quote(name),
              to_string(one.shape), to_string(other.shape));
  const int original = state->add_leaf(one);
  state->replicas.emplace_back(original, state->add_leaf(std::move(other)));
}

}  // namespace

bool is_folded(const TorchFile& document) {
  const Fields fields(document);
  return fields.maybe(fields.root(), "folding") != kNoNode;
}

void refuse_second_file(const ShardedState& state, int first, int second) {
  const auto name = [&](int file) { return state.files[static_cast<size_t>(file)].relative; };
  throw Error(ErrorInfo{
      .code = ErrorCode::kUnsupported,
      .what = "Two mp ranks' files stand for one expert (DeepSpeed: NotImplementedError).",
      .file = state.folder,
      .expected = "one file an expert",
      .found = name(first) + " and " + name(second),
      .next = "experts cut over tensor-parallel ranks are not supported; if one file is left over "
              "from another save, remove it after looking at both"});
}

void add_expert_copies(ShardedState* state, const ExpertInfo& experts,
                       const std::vector<int>& files) {
  ExpertTensorsByName tensors;
  for (int file : files) {
    const Fields f(state->document(file));
    for (const auto& [name, node] : f.named(f.root(), "expert file")) {
      if (name != "folding") add_expert_tensor(state, file, name, f.tensor(node, name), &tensors);
    }
  }
  std::vector<ParameterState> parameters = state->parameters;
  for (ParameterState& parameter : parameters) {
    const ExpertLayer* layer = experts.layer_of(parameter.name);
    if (layer == nullptr && !ExpertInfo::expert_number(parameter.name)) continue;
    Leaf copy{.name = parameter.name, .state = "param", .shape = parameter.shape, .fragments = {}};
    const int64_t count = layer == nullptr ? 1 : layer->experts;
    const int64_t size = numel(parameter.shape) / std::max<int64_t>(count, 1);
    for (int64_t id = 0; id < count; ++id) {
      const std::string name =
          layer == nullptr ? parameter.name : parameter.name + "." + std::to_string(id);
      const auto found = tensors.find(name);
      if (found == tensors.end()) refuse_missing_expert(*state, name, files.size());
      const auto& [file, view] = found->second;
      const Fields f(state->document(file));
      const Shape expected = layer == nullptr
                                 ? parameter.shape
                                 : Shape(parameter.shape.begin() + 1, parameter.shape.end());
      if (view.shape != expected)
        f.fail("An expert's tensor has another shape than its master.", quote(name),
               to_string(expected), to_string(view.shape));
      if (id > 0 && view.dtype != copy.dtype)
        f.fail("Experts of one layer have different dtypes.", quote(name),
               isoshard::name(copy.dtype), isoshard::name(view.dtype));
      copy.dtype = view.dtype;
      for (FileFragment fragment : file_fragments(f.document(), file, view)) {
        fragment.begin += id * size;
        copy.fragments.push_back(fragment);
      }
      tensors.erase(found);
    }
    parameter.model_dtype = copy.dtype;
    parameter.model_copy = state->add_leaf(std::move(copy));
  }
  state->set_parameters(std::move(parameters));
  if (tensors.empty()) return;
  throw Error(ErrorInfo{
      .code = ErrorCode::kUnsupported,
      .what = "An expert file holds what no optimizer group names; frozen experts are not "
              "supported yet.",
      .file = state->document(tensors.begin()->second.first).path(),
      .entry = quote(tensors.begin()->first),
      .expected = "trained experts alone",
      .found = std::to_string(tensors.size()) + " tensors without a master",
      .next = "look whether the file is of another save"});
}

}  // namespace isoshard::checkpoint
