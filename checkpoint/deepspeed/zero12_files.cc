// Stages 1 and 2: one flat buffer a group, cut evenly. A parameter's place follows from the order
// of param_shapes; param_slice_mappings is only compared (it is wrong under round_robin_gradients).
#include <map>

#include "checkpoint/cancel.h"
#include "checkpoint/deepspeed/zero_files.h"
#include "core/error.h"
#include "core/layout.h"
#include "core/mutant.h"
#include "core/zero_rules.h"

namespace isoshard::checkpoint {
namespace {

struct RankFile {
  int file;
  NodeId optimizer;  // optimizer_state_dict
  NodeId base;       // base_optimizer_state
};

class Zero12Reader {
 public:
  Zero12Reader(ShardedState* state, const ModelStates& model, const GroupMask& groups)
      : state_(*state), model_(model), groups_(groups) {
    dp_ = static_cast<int>(state_.optim_files.size());
  }

  void run() {
    for (int file : state_.optim_files) {
      throw_if_cancelled();
      open(file);
    }
    const Fields first = fields(0);
    const Pickle& pickle = first.pickle();
    const NodeId stage = pickle.find(ranks_[0].optimizer, "zero_stage");
    bf16_ = stage == kNoNode;
    state_.flavour = bf16_ ? Flavour::kBf16Optimizer : Flavour::kZero12;
    state_.stage = 1;
    if (!bf16_) {
      state_.stage = static_cast<int>(first.stage(stage));
    }
    if (state_.stage != 1 && state_.stage != 2) {
      first.fail("The stage does not fit the file's form.", "zero_stage", "1 or 2",
                 std::to_string(state_.stage));
    }
    state_.round_robin = !bf16_ && zero_option(Fields(state_.document(model_.file)), model_.config,
                                               "round_robin_gradients", 0) != 0;
    for (size_t group = 0; group < model_.param_shapes.size(); ++group) {
      if (groups_.empty() || groups_[group])
        read_group(static_cast<int>(group));
      else
        state_.groups.push_back(
            {.hyper = hyper_of(static_cast<int>(group)), .parameters = {}, .flat_order = {}});
    }
  }

 private:
  Fields fields(size_t rank) const { return Fields(state_.document(ranks_[rank].file)); }
  NodeId optimizer_key(size_t rank, const char* key) const {
    return fields(rank).need(ranks_[rank].optimizer, key);
  }
  NodeId group_item(size_t rank, const char* key, int group) const {
    const std::vector<NodeId>& list = fields(rank).list(optimizer_key(rank, key), key);
    if (list.size() != model_.param_shapes.size()) {
      fields(rank).fail("The number of groups differs from param_shapes.", key,
                        std::to_string(model_.param_shapes.size()), std::to_string(list.size()));
    }
    return list[static_cast<size_t>(group)];
  }

  void open(int file) {
    const Fields f(state_.document(file));
    RankFile rank{file, f.need(f.root(), "optimizer_state_dict"), kNoNode};
    rank.base = f.need(rank.optimizer, "base_optimizer_state");
    if (!f.pickle().is_mapping(rank.base)) {
      throw Error(
          ErrorInfo{.code = ErrorCode::kUnsupported,
                    .what = "Elastic checkpoints (elastic_checkpoint: true) are not supported.",
                    .file = f.document().path(),
                    .entry = "base_optimizer_state",
                    .next = "save again with elastic_checkpoint false; it never lifted DeepSpeed's "
                            "own dp check"});
    }
    ranks_.push_back(rank);
  }

  void read_group(int group);
  NodeRef hyper_of(int group) const;
  void read_layout(int group);
  void check_slices(size_t rank, int group) const;
  void add_states(size_t rank, int group);
  void add_run(size_t rank, const TensorView& view, const char* state, bool padded,
               const std::string& what);

  ShardedState& state_;
  const ModelStates& model_;
  const GroupMask& groups_;
  int dp_ = 0;
  bool bf16_ = false;
  std::vector<RankFile> ranks_;
  // Of the group being read:
  NamedShapes shapes_;
  std::vector<int> parameters_;  // numbers in state_.parameters, in flat order
  std::vector<TensorLayout> layouts_;
  int64_t total_ = 0;  // elements without the padding at the end
  FlatSizes sizes_;
  std::map<std::string, std::vector<int>> leaves_;  // state → leaf of each parameter
};

void Zero12Reader::read_group(int group) {
  shapes_ = model_.param_shapes[static_cast<size_t>(group)];
  parameters_.clear();
  leaves_.clear();
  read_layout(group);
  for (size_t rank = 0; rank < ranks_.size(); ++rank) {
    const Fields f = fields(rank);
    const int64_t padding = f.integer(group_item(rank, "group_paddings", group), "group_paddings");
    const int64_t count = f.integer(group_item(rank, "partition_count", group), "partition_count");
    if (count != dp_ && !mutant("partition_count_unchecked"))
      f.fail("A group's partition count differs from the number of files.",
             "partition_count[" + std::to_string(group) + "]", std::to_string(dp_),
             std::to_string(count));
    const int r = static_cast<int>(rank);
    const int64_t expected = bf16_ ? bf16_partition_padding(total_, sizes_, dp_, r)
                                   : partition_padding(total_, sizes_.partition, r);
    if (padding != expected && !mutant("file_padding_unchecked")) {
      f.fail("The padding of a partition is not what the parameter shapes call for.",
             "group_paddings[" + std::to_string(group) + "]", std::to_string(expected),
             std::to_string(padding));
    }
    add_run(rank,
            f.flat_tensor(group_item(rank, "single_partition_of_fp32_groups", group),
                          "single_partition_of_fp32_groups"),
            "fp32", bf16_, "single_partition_of_fp32_groups[" + std::to_string(group) + "]");
    check_slices(rank, group);
    add_states(rank, group);
  }
  GroupState result{.hyper = hyper_of(group), .parameters = {}, .flat_order = {}};
  result.flat_order = parameters_;
  result.parameters = parameters_;
  if (state_.round_robin) {
    const std::vector<int> order = round_robin_order(static_cast<int>(parameters_.size()), dp_);
    for (size_t k = 0; k < order.size(); ++k)
      result.parameters[static_cast<size_t>(mutant("round_robin_order_ignored") ? k : order[k])] =
          parameters_[k];
  }
  state_.groups.push_back(std::move(result));
}

// The group's entry of param_groups, as rank 0 has it.
NodeRef Zero12Reader::hyper_of(int group) const {
  const Fields first = fields(0);
  const std::vector<NodeId>& hyper =
      first.list(first.need(ranks_[0].base, "param_groups"), "param_groups");
  if (hyper.size() != model_.param_shapes.size()) {
    first.fail("The number of param_groups differs from param_shapes.", "param_groups",
               std::to_string(model_.param_shapes.size()), std::to_string(hyper.size()));
  }
  return {ranks_[0].file, hyper[static_cast<size_t>(group)]};
}

// Adds the group's parameters and says where each begins in the flat buffer.
void Zero12Reader::read_layout(int group) {
  std::vector<int64_t> alignment(shapes_.size(), 0);
  const Fields first = fields(0);
  if (first.maybe(ranks_[0].optimizer, "param_alignment_paddings") != kNoNode) {
    const std::vector<NodeId>& list =
        first.list(group_item(0, "param_alignment_paddings", group), "param_alignment_paddings");
    if (list.size() != shapes_.size()) {
      first.fail("The alignment paddings do not fit the parameters.", "param_alignment_paddings",
                 std::to_string(shapes_.size()), std::to_string(list.size()));
    }
    for (size_t i = 0; i < list.size(); ++i) {
      alignment[i] = first.integer(list[i], "param_alignment_paddings");
      if (alignment[i] < 0 || alignment[i] > 16)
        first.fail("An alignment padding is impossible.", "param_alignment_paddings", "0 to 15",
                   std::to_string(alignment[i]));
    }
  }
  layouts_.clear();
  int64_t offset = 0;
  for (size_t i = 0; i < shapes_.size(); ++i) {
    const auto& [name, shape] = shapes_[i];
    if (state_.find_parameter(name) != nullptr)
      first.fail("A parameter stands in two groups.", quote(name), "once", "twice");
    state_.parameters.push_back(
        {.name = name, .shape = shape, .group = group, .states = {}, .scalars = {}});
    parameters_.push_back(static_cast<int>(state_.parameters.size()) - 1);
    layouts_.push_back(
        {.numel = numel(shape), .ranks = dp_, .placement = FlatShard{.group_offset = offset}});
    offset += numel(shape) + (mutant("alignment_padding_ignored") ? 0 : alignment[i]);
  }
  total_ = offset;
  sizes_ = flat_sizes(total_, dp_);
  for (TensorLayout& layout : layouts_)
    std::get<FlatShard>(layout.placement).partition = std::max<int64_t>(sizes_.partition, 1);
}

// DeepSpeed computes slice maps from the optimizer's order, also where the buffer is permuted.
void Zero12Reader::check_slices(size_t rank, int group) const {
  const Fields f = fields(rank);
  std::map<std::string, std::pair<int64_t, int64_t>> found;
  for (const auto& [name, node] :
       f.named(group_item(rank, "param_slice_mappings", group), "param_slice_mappings")) {
    const NodeId address = f.state_of(node);
    found[name] = {f.integer(f.need(address, "start"), "start"),
                   f.integer(f.need(address, "numel"), "numel")};
  }
  std::vector<size_t> order(shapes_.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  const auto expected_in = [&](const std::vector<size_t>& positions) {
    std::map<std::string, std::pair<int64_t, int64_t>> expected;
    int64_t offset = 0;
    for (size_t i : positions) {
      TensorLayout layout = layouts_[i];
      FlatShard& shard = std::get<FlatShard>(layout.placement);
      if (!state_.round_robin) offset = shard.group_offset;
      shard.group_offset = offset;
      offset += layout.numel;
      if (const RankFragment fragment = fragment_on(layout, static_cast<int>(rank));
          fragment.count > 0) {
        expected[shapes_[i].first] = {fragment.offset_local, fragment.count};
      }
    }
    return expected;
  };
  if (state_.round_robin) {
    const std::vector<int> permuted = round_robin_order(static_cast<int>(order.size()), dp_);
    for (size_t k = 0; k < order.size(); ++k) order[static_cast<size_t>(permuted[k])] = k;
  }
  if (found == expected_in(order) || mutant("slice_map_unchecked")) return;
  std::vector<size_t> flat(shapes_.size());
  for (size_t i = 0; i < flat.size(); ++i) flat[i] = i;
  std::map<std::string, std::pair<int64_t, int64_t>> truth;
  for (size_t i : flat) {
    if (const RankFragment fragment = fragment_on(layouts_[i], static_cast<int>(rank));
        fragment.count > 0) {
      truth[shapes_[i].first] = {fragment.offset_local, fragment.count};
    }
  }
  if (found == truth) return;
  for (const auto& [name, place] : expected_in(order)) {
    const auto other = found.find(name);
    if (other != found.end() && other->second == place) continue;
    f.fail("A parameter's slice is not where the shapes put it.",
           "param_slice_mappings " + quote(name),
           "start " + std::to_string(place.first) + ", numel " + std::to_string(place.second),
           other == found.end() ? "absent"
                                : "start " + std::to_string(other->second.first) + ", numel " +
                                      std::to_string(other->second.second));
  }
  f.fail("The slice map names parameters that have no elements on this rank.",
         "param_slice_mappings", std::to_string(truth.size()), std::to_string(found.size()));
}

void Zero12Reader::add_run(size_t rank, const TensorView& view, const char* state, bool padded,
                           const std::string& what) {
  const Fields f = fields(rank);
  const int r = static_cast<int>(rank);
  const int64_t length =
      padded ? sizes_.partition : sizes_.partition - partition_padding(total_, sizes_.partition, r);
  if (view.shape[0] != length && !mutant("partition_length_unchecked")) {
    f.fail("A partition has the wrong length.", what, std::to_string(length) + " elements",
           std::to_string(view.shape[0]));
  }
  std::vector<int>& numbers = leaves_[state];
  if (numbers.empty()) {
    for (int number : parameters_) {
      ParameterState& parameter = state_.parameters[static_cast<size_t>(number)];
      const int leaf = state_.add_leaf({.name = parameter.name,
                                        .state = state,
                                        .dtype = view.dtype,
                                        .shape = parameter.shape,
                                        .requires_grad = view.requires_grad,
                                        .fragments = {}});
      numbers.push_back(leaf);
      if (std::string(state) == "fp32")
        parameter.weight = leaf;
      else
        parameter.states.push_back(leaf);
    }
  }
  for (size_t i = 0; i < layouts_.size(); ++i) {
    Leaf& leaf = state_.leaf(numbers[i]);
    if (leaf.dtype != view.dtype)
      f.fail("Ranks disagree on a state's dtype.", what, name(leaf.dtype), name(view.dtype));
    if (const RankFragment fragment = fragment_on(layouts_[i], r); fragment.count > 0) {
      leaf.fragments.push_back(
          {fragment.begin, fragment.count, ranks_[rank].file,
           f.document().data_offset(view) + fragment.offset_local * item_size_bytes(view.dtype)});
    }
  }
}

void Zero12Reader::add_states(size_t rank, int group) {
  const Fields f = fields(rank);
  const std::string what = "base_optimizer_state.state[" + std::to_string(group) + "]";
  const NodeId entry = find_index(f.pickle(), f.need(ranks_[rank].base, "state"), group);
  OptimizerState found;
  if (entry != kNoNode) found = sort_optimizer_state(f, entry, what);
  if (rank > 0 && found.tensors.size() + 1 != leaves_.size()) {
    f.fail("Ranks disagree on the optimizer's states.", what,
           std::to_string(leaves_.size() - 1) + " tensors", std::to_string(found.tensors.size()));
  }
  for (const auto& [state, view] : found.tensors) {
    if (rank > 0 && leaves_.count(state) == 0)
      f.fail("Ranks disagree on the optimizer's states.", what, "as rank 0", quote(state));
    add_run(rank, view, state.c_str(), true, what + " " + state);
    state_.stepped = true;
  }
  if (rank > 0) return;
  for (int number : parameters_) {
    for (const auto& [state, node] : found.scalars) {
      state_.parameters[static_cast<size_t>(number)].scalars.push_back(
          {state, {ranks_[rank].file, node}});
    }
  }
}

}  // namespace

void read_zero12(ShardedState* state, const ModelStates& model, const GroupMask& groups) {
  Zero12Reader(state, model, groups).run();
}

}  // namespace isoshard::checkpoint
