// Stage 3: every parameter cut into equal slots; a rank's flat buffers (sub-groups) are its slots
// one behind another, in the order of param_shapes.
#include <algorithm>
#include <map>
#include <numeric>
#include <set>
#include <unordered_map>

#include "checkpoint/cancel.h"
#include "checkpoint/deepspeed/zero_files.h"
#include "core/error.h"
#include "core/layout.h"
#include "core/mutant.h"
#include "core/zero_rules.h"

namespace isoshard::checkpoint {
namespace {

class Zero3Reader {
 public:
  Zero3Reader(ShardedState* state, const ModelStates& model, const GroupMask& mask,
              std::vector<int> members)
      : state_(*state),
        model_(model),
        mask_(mask),
        members_(std::move(members)),
        dp_(static_cast<int>(members_.size())) {}

  void run() {
    state_.flavour = Flavour::kZero3;
    state_.stage = 3;
    add_parameters();
    for (int rank = 0; rank < dp_; ++rank) {
      throw_if_cancelled();
      read_rank(rank);
    }
    read_groups();
  }

  void check_models() const;

 private:
  const ModelStates& model() const { return model_; }
  Fields fields(int rank) const {
    return Fields(state_.document(state_.optim_files[static_cast<size_t>(rank)]));
  }

  bool is_read(size_t sub_group) const { return mask_.empty() || mask_[sub_group]; }
  void add_parameters();
  void check_partition(const Fields& f, NodeId optimizer, int rank) const;
  void read_rank(int rank);
  void add_flat(int rank, size_t sub_group, const TensorView& view, const std::string& state,
                const std::string& what);
  void read_groups();

  ShardedState& state_;
  const ModelStates& model_;
  const GroupMask& mask_;                                       // by sub-group; empty: all are read
  const std::vector<int> members_;                              // ranks of the partition group
  int dp_;                                                      // how many they are
  std::vector<std::vector<int>> sub_groups_;                    // parameters of each
  std::vector<std::vector<TensorLayout>> layouts_;              // of each
  std::vector<int64_t> lengths_;                                // of each sub-group on one rank
  std::map<std::string, std::unordered_map<int, int>> leaves_;  // state → parameter → leaf
};

void Zero3Reader::check_models() const {
  std::set<const TorchDocument*> seen;  // ranks with the same pickle say the same
  const auto shapes_of = [&](const ModelStates& model) {
    std::vector<NamedShapes> read;
    for (size_t k = 0; k < model.param_shapes.size(); ++k)
      read.push_back(is_read(k) ? model.param_shapes[k] : NamedShapes());
    return read;
  };
  for (int rank : members_) {
    if (static_cast<size_t>(rank) >= state_.model_files.size()) continue;
    const int file = state_.model_files[static_cast<size_t>(rank)];
    if (file == model_.file || !seen.insert(&state_.document(file).document()).second) continue;
    const ModelStates other = read_model_states(state_, file);
    if (other.param_shapes.size() != model().param_shapes.size() ||
        shapes_of(other) != shapes_of(model()) || other.frozen_shapes != model().frozen_shapes ||
        other.global_steps != model().global_steps || other.version != model().version) {
      throw Error(
          ErrorInfo{.code = ErrorCode::kMismatch,
                    .what = "Two ranks' model files do not belong together.",
                    .file = state_.document(other.file).path(),
                    .entry = "param_shapes, global_steps or ds_version",
                    .expected = "as in rank 0, or as the placement of experts says: step " +
                                std::to_string(model().global_steps),
                    .found = "step " + std::to_string(other.global_steps) +
                             (shapes_of(other) == shapes_of(model()) ? "" : ", other param_shapes"),
                    .next = "put the files of one save together"});
    }
  }
}

void Zero3Reader::add_parameters() {
  for (const NamedShapes& shapes : model().param_shapes) {
    std::vector<int> parameters;
    std::vector<TensorLayout> layouts;
    int64_t offset = 0;
    for (const auto& [name, shape] : is_read(sub_groups_.size()) ? shapes : NamedShapes()) {
      if (state_.find_parameter(name) != nullptr)
        fields(0).fail("A parameter stands in two sub-groups.", quote(name), "once", "twice");
      state_.parameters.push_back({.name = name,
                                   .shape = shape,
                                   .group = 0,
                                   .sub_group = static_cast<int>(sub_groups_.size()),
                                   .states = {},
                                   .scalars = {}});
      parameters.push_back(static_cast<int>(state_.parameters.size()) - 1);
      const int64_t slot = slot_size(numel(shape), dp_);
      layouts.push_back({.numel = numel(shape),
                         .ranks = dp_,
                         .placement = SlotShard{offset, std::max<int64_t>(slot, 1)}});
      offset += mutant("slots_share_a_place") ? 0 : slot;
    }
    sub_groups_.push_back(std::move(parameters));
    layouts_.push_back(std::move(layouts));
    lengths_.push_back(offset);
  }
}

void Zero3Reader::add_flat(int rank, size_t sub_group, const TensorView& view,
                           const std::string& state, const std::string& what) {
  const Fields f = fields(rank);
  if (view.shape[0] != lengths_[sub_group] && !mutant("slot_length_unchecked")) {
    f.fail("A partition has the wrong length.", what,
           std::to_string(lengths_[sub_group]) + " elements", std::to_string(view.shape[0]));
  }
  std::unordered_map<int, int>& leaves = leaves_[state];
  const int file = state_.optim_files[static_cast<size_t>(rank)];
  const int64_t data = f.document().data_offset(view), item = item_size_bytes(view.dtype);
  for (size_t i = 0; i < sub_groups_[sub_group].size(); ++i) {
    const int number = sub_groups_[sub_group][i];
    const auto [found, fresh] = leaves.emplace(number, -1);
    if (fresh) {
      ParameterState& parameter = state_.parameters[static_cast<size_t>(number)];
      if (rank > 0)
        f.fail("Ranks disagree on the optimizer's states.", what, "as rank 0", quote(state));
      found->second = state_.add_leaf({.name = parameter.name,
                                       .state = state,
                                       .dtype = view.dtype,
                                       .shape = parameter.shape,
                                       .requires_grad = view.requires_grad,
                                       .fragments = {}});
      if (state == "fp32")
        parameter.weight = found->second;
      else
        parameter.states.push_back(found->second);
      if (state_.has_places)
        state_.leaf(found->second)
            .fragments.reserve(static_cast<size_t>(std::min<int64_t>(dp_, numel(parameter.shape))));
    }
    Leaf& leaf = state_.leaf(found->second);
    if (leaf.dtype != view.dtype)
      f.fail("Ranks disagree on a state's dtype.", what, name(leaf.dtype), name(view.dtype));
    if (!state_.has_places) continue;
    if (const RankFragment fragment = fragment_on(layouts_[sub_group][i], rank);
        fragment.count > 0) {
      leaf.fragments.push_back(
          {fragment.begin, fragment.count, file, data + fragment.offset_local * item});
    }
  }
}

void Zero3Reader::read_rank(int rank) {
  const Fields f = fields(rank);
  const NodeId optimizer = f.need(f.root(), "optimizer_state_dict");
  check_partition(f, optimizer, rank);
  const std::vector<NodeId>& flats =
      f.list(f.need(optimizer, "fp32_flat_groups"), "fp32_flat_groups");
  if (flats.size() != sub_groups_.size()) {
    f.fail("The number of sub-groups differs from param_shapes.", "fp32_flat_groups",
           std::to_string(sub_groups_.size()), std::to_string(flats.size()));
  }
  const NodeId nested = f.need(optimizer, "optimizer_state_dict");
  const NodeId states = f.need(nested, "state");
  for (size_t k = 0; k < flats.size(); ++k) {
    if (!is_read(k)) continue;
    const std::string place = "[" + std::to_string(k) + "]";
    add_flat(rank, k, f.flat_tensor(flats[k], "fp32_flat_groups"), "fp32",
             "fp32_flat_groups" + place);
    const NodeId entry = find_index(f.pickle(), states, static_cast<int64_t>(k));
    if (entry == kNoNode) continue;
    const OptimizerState found = sort_optimizer_state(f, entry, "state" + place);
    for (const auto& [state, view] : found.tensors) {
      add_flat(rank, k, view, state, "state" + place + " " + state);
      state_.stepped = true;
    }
    if (rank > 0) continue;
    for (int number : sub_groups_[k]) {
      for (const auto& [state, node] : found.scalars) {
        state_.parameters[static_cast<size_t>(number)].scalars.push_back(
            {state, {state_.optim_files[0], node}});
      }
    }
  }
}

// Who shares in the sub-groups that are read, as the rank's file records it.
void Zero3Reader::check_partition(const Fields& f, NodeId optimizer, int rank) const {
  const int64_t count = f.integer(f.need(optimizer, "partition_count"), "partition_count");
  if (count != model_.dp_world)
    f.fail("A rank's partition count differs from the number of files.", "partition_count",
           std::to_string(model_.dp_world), std::to_string(count));
  for (size_t k = 0; k < sub_groups_.size(); ++k) {
    const NodeId entry =
        is_read(k) ? partition_group(f, optimizer, static_cast<int64_t>(k)) : kNoNode;
    if (entry == kNoNode && is_read(k) && dp_ != model_.dp_world)
      f.fail("No file says which ranks share a sub-group of experts (DeepSpeed: RuntimeError).",
             "ds_zero_partition_groups", "an entry for sub-group " + std::to_string(k), "none");
    if (entry == kNoNode) continue;
    std::vector<int> ranks;
    for (NodeId item : f.list(f.need(entry, "partition_ranks"), "partition_ranks"))
      ranks.push_back(static_cast<int>(f.integer(item, "partition_ranks")));
    const int64_t own = f.integer(f.need(entry, "partition_rank"), "partition_rank");
    if (ranks != members_ || own != rank ||
        f.integer(f.need(entry, "partition_count"), "partition_count") != dp_) {
      const auto text = [](const std::vector<int>& list) {
        std::string result;
        for (int item : list) result += (result.empty() ? "" : ", ") + std::to_string(item);
        return result;
      };
      f.fail(
          "The ranks that share a sub-group are not those that the layers' metadata names "
          "(DeepSpeed: RuntimeError).",
          "ds_zero_partition_groups[" + std::to_string(k) + "]",
          "rank " + std::to_string(rank) + " of " + text(members_),
          "rank " + std::to_string(own) + " of " + text(ranks));
    }
  }
}

// param_groups[g].params lists the sub-groups of group g.
void Zero3Reader::read_groups() {
  const Fields f = fields(0);
  const NodeId nested = f.need(f.need(f.root(), "optimizer_state_dict"), "optimizer_state_dict");
  std::vector<bool> seen(sub_groups_.size(), false);
  for (NodeId hyper : f.list(f.need(nested, "param_groups"), "param_groups")) {
    GroupState group;
    group.hyper = {state_.optim_files[0], hyper};
    for (NodeId item : f.list(f.need(hyper, "params"), "params")) {
      const int64_t k = f.integer(item, "params");
      if (k < 0 || k >= static_cast<int64_t>(sub_groups_.size()) || seen[static_cast<size_t>(k)]) {
        f.fail("A param group names a sub-group that is not there, or twice.", "param_groups",
               "each of " + std::to_string(sub_groups_.size()) + " once", std::to_string(k));
      }
      seen[static_cast<size_t>(k)] = true;
      for (int number : sub_groups_[static_cast<size_t>(k)]) {
        state_.parameters[static_cast<size_t>(number)].group =
            static_cast<int>(state_.groups.size());
        group.parameters.push_back(number);
      }
    }
    group.flat_order = group.parameters;
    state_.groups.push_back(std::move(group));
  }
  for (size_t k = 0; k < seen.size(); ++k) {
    if (!seen[k])
      f.fail("A sub-group belongs to no param group.", "param_groups", "each sub-group once",
             "none for " + std::to_string(k));
  }
}

}  // namespace

void add_frozen_slots(ShardedState* state, const ModelStates& model) {
  const int dp = static_cast<int>(state->model_files.size());
  for (const auto& [name, shape] : model.frozen_shapes) {
    ParameterState parameter{.name = name, .shape = shape, .states = {}, .scalars = {}};
    Leaf leaf{.name = name, .state = "param", .shape = shape, .fragments = {}};
    const TensorLayout layout{
        .numel = numel(shape),
        .ranks = dp,
        .placement = SlotShard{0, std::max<int64_t>(slot_size(numel(shape), dp), 1)}};
    for (int rank = 0; rank < dp; ++rank) {
      const int file = state->model_files[static_cast<size_t>(rank)];
      const Fields f(state->document(file));
      const NodeId slots = f.need(f.root(), "frozen_param_fragments");
      const TensorView view = f.flat_tensor(f.need(slots, name), "frozen_param_fragments " + name);
      if (view.shape[0] != slot_size(numel(shape), dp) && !mutant("frozen_slot_unchecked")) {
        f.fail("A frozen fragment has the wrong length.", quote(name),
               std::to_string(slot_size(numel(shape), dp)), std::to_string(view.shape[0]));
      }
      leaf.dtype = view.dtype;
      if (const RankFragment fragment = fragment_on(layout, rank); fragment.count > 0) {
        leaf.fragments.push_back(
            {fragment.begin, fragment.count, file,
             f.document().data_offset(view) + fragment.offset_local * item_size_bytes(view.dtype)});
      }
    }
    parameter.model_dtype = leaf.dtype;
    parameter.weight = state->add_leaf(std::move(leaf));
    state->parameters.push_back(std::move(parameter));
  }
}

NodeId partition_group(const Fields& fields, NodeId optimizer, int64_t sub_group) {
  const NodeId list = fields.maybe(optimizer, "ds_zero_partition_groups");
  if (list == kNoNode) return kNoNode;
  for (NodeId entry : fields.list(list, "ds_zero_partition_groups")) {
    if (fields.integer(fields.need(entry, "sub_group"), "sub_group") == sub_group) return entry;
  }
  return kNoNode;
}

void read_zero3_part(ShardedState* state, const ModelStates& model, const GroupMask& sub_groups,
                     const std::vector<int>& members) {
  Zero3Reader reader(state, model, sub_groups, members);
  reader.check_models();
  reader.run();
}

void read_zero3(ShardedState* state, const ModelStates& model, const GroupMask& sub_groups) {
  std::vector<int> all(state->optim_files.size());
  std::iota(all.begin(), all.end(), 0);
  Zero3Reader reader(state, model, sub_groups, std::move(all));
  reader.check_models();
  reader.run();
  add_frozen_slots(state, model);
}

}  // namespace isoshard::checkpoint
