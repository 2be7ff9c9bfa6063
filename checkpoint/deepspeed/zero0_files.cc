// See zero0_files.h.
#include "checkpoint/deepspeed/zero0_files.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <tuple>

#include "checkpoint/deepspeed/expert_groups.h"
#include "checkpoint/deepspeed/hyper.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

class Zero0Reader {
 public:
  Zero0Reader(ShardedState* state, const ModelStates& model, const ExpertInfo& experts,
              const Zero0Rank& rank, const ReadOptions& options, Storage& storage)
      : state_(*state),
        model_(model),
        experts_(experts),
        rank_(rank),
        options_(options),
        storage_(storage),
        module_(state->document(model.file)),
        file_(rank.optimizer.present() ? rank.optimizer.file : model.file),
        fields_(state->document(file_)) {}

  void run();

 private:
  void read_module();
  void insert_experts();
  void read_optimizer();
  void read_slots(const std::vector<NodeId>& hypers, const std::vector<NodeId>& masters,
                  const std::map<int64_t, NodeId>& states);
  void sort_state(Slot* slot) const;
  void adopt_zero_dim_states();
  std::vector<std::vector<size_t>> orders() const;
  void name_slots();
  void find_families();
  [[noreturn]] void refuse(const std::string& what, const std::string& entry,
                           const std::string& expected, const std::string& found) const;

  int add_leaf(const std::string& name, const std::string& state, const TensorView& view);
  int add_entry(const ModuleEntry& entry, const std::string& state);
  void add_parameter(const Slot& slot);
  void add_frozen();

  ShardedState& state_;
  const ModelStates& model_;
  const ExpertInfo& experts_;
  const Zero0Rank& rank_;
  const ReadOptions& options_;
  Storage& storage_;
  const Fields module_;
  const int file_;  // with the optimizer
  const Fields fields_;
  std::vector<ModuleEntry> entries_;  // in registration order
  std::vector<Slot> slots_;           // group by group
  bool has_masters_ = false;
};

void Zero0Reader::run() {
  state_.flavour = Flavour::kZero0;
  state_.stage = 0;
  read_module();
  insert_experts();
  if (options_.model_files_only) return add_frozen();
  if (rank_.optimizer.present()) {
    read_optimizer();
    name_slots();
    for (const Slot& slot : slots_) add_parameter(slot);
  }
  add_frozen();
}

void Zero0Reader::refuse(const std::string& what, const std::string& entry,
                         const std::string& expected, const std::string& found) const {
  throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                        .what = what,
                        .file = fields_.document().path(),
                        .entry = entry,
                        .expected = expected,
                        .found = found,
                        .next = "`isoshard help` lists what this version reads"});
}

int Zero0Reader::add_leaf(const std::string& name, const std::string& state,
                          const TensorView& view) {
  return state_.add_leaf(file_leaf(fields_.document(), file_, view, name, state));
}

int Zero0Reader::add_entry(const ModuleEntry& entry, const std::string& state) {
  Leaf leaf = entry.leaf;
  leaf.state = state;
  return state_.add_leaf(std::move(leaf));
}

// Buffers and aliases go to the state at once. shared_params is None: an alias shows by its place,
// a router's second name by the layer it stands in.
void Zero0Reader::read_module() {
  std::map<std::tuple<int, int64_t, Shape, Shape>, std::string> first_names;
  std::set<std::string> names;
  for (const auto& [name, node] : model_.module) {
    const TensorView view = module_.tensor(node, "module " + name);
    if (!names.insert(name).second) {
      module_.fail("A name stands twice in the module.", quote(name), "once", "twice");
    }
    state_.module_order.push_back(name);
    ModuleEntry entry{.leaf = file_leaf(module_.document(), model_.file, view, name, "param"),
                      .local_name = name};
    if (model_.buffer_names.count(name) != 0) {
      state_.buffers.push_back({name, add_entry(entry, "buffer")});
      continue;
    }
    if (const auto shared = model_.shared.find(name); shared != model_.shared.end()) {
      state_.aliases.push_back(
          {name, shared->second, add_entry(entry, "param"), !model_.unrecorded.contains(name)});
      continue;
    }
    const auto [first, fresh] =
        first_names.emplace(std::tuple(view.storage, view.offset, view.shape, view.stride), name);
    if (fresh || numel(view.shape) == 0) {
      const ExpertLayer* layer = experts_.layer_around(name);
      entry.replaced = layer != nullptr && name.starts_with(router_of(*layer));
      entries_.push_back(std::move(entry));
    } else {
      state_.aliases.push_back({name, first->second, add_entry(entry, "param")});
    }
  }
}

void Zero0Reader::insert_experts() {
  for (const ExpertBlock& block : rank_.experts) {
    // Behind the last name of the module, alias or not, that is registered before them.
    const std::vector<std::string>& order = state_.module_order;
    const auto last = std::find_if(order.rbegin(), order.rend(), [&](const std::string& name) {
      return name.starts_with(block.after);
    });
    if (last == order.rend() && !options_.model_files_only)
      refuse("Where a layer's experts stand among the module's parameters is not known.",
             quote(block.after), "its gate or router in the module", "nothing");
    const std::set<std::string> before(order.begin(), last.base());
    const auto at = std::find_if(entries_.begin(), entries_.end(), [&](const ModuleEntry& entry) {
      return !entry.expert && !before.contains(entry.local_name);
    });
    entries_.insert(at, block.entries.begin(), block.entries.end());
  }
}

// In which orders a group may list its parameters: as the module registers them; where the caller
// listed them before AutoEP replaced routers and experts, the new ones come last
// (engine.py, _remap_param_groups_after_module_replacement).
std::vector<std::vector<size_t>> Zero0Reader::orders() const {
  std::vector<size_t> registered, others, replaced;
  for (size_t i = 0; i < entries_.size(); ++i) {
    registered.push_back(i);
    (entries_[i].replaced ? replaced : others).push_back(i);
  }
  if (replaced.empty()) return {registered};
  others.insert(others.end(), replaced.begin(), replaced.end());
  return {registered, others};
}

void Zero0Reader::name_slots() {
  SlotNames names(state_, file_, &slots_, entries_, orders());
  std::string evidence = "--param-order";
  if (options_.param_order.empty()) {
    evidence = names.infer();
  } else {
    names.take_order(options_.param_order,
                     read_small_file(storage_, options_.param_order, int64_t{64} << 20));
  }
  if (has_masters_ && options_.prove) {
    names.prove();
    evidence += "; every master, cast to the module's dtype, equals the module's bits";
  }
  state_.inferred.push_back("parameter names of the optimizer state: " + evidence);
}

void Zero0Reader::read_optimizer() {
  const NodeId optimizer = rank_.optimizer.node;
  const NodeId masters = fields_.maybe(optimizer, "fp32_groups");
  const NodeId base = torch_state(fields_, optimizer);
  const NodeId state = fields_.maybe(base, "state");
  const NodeId groups = fields_.maybe(base, "param_groups");
  has_masters_ = masters != kNoNode;
  if ((base == optimizer) == has_masters_ || state == kNoNode || groups == kNoNode) {
    const bool fused = fields_.maybe(optimizer, "fp32_groups_flat") != kNoNode;
    std::string keys;
    for (const auto& [key, node] : fields_.named(optimizer, "optimizer")) keys += quote(key) + " ";
    refuse(fused ? "The fused FP16_Optimizer of stage 0 (fp32_groups_flat) is not supported."
                 : "The optimizer's state has an unknown form.",
           "optimizer", "state, param_groups; or optimizer_state_dict, fp32_groups", keys);
  }
  if (!fields_.pickle().is_mapping(state))
    fields_.fail("The optimizer's state is no dictionary.", "state", "dict",
                 name(fields_.pickle().kind(state)));
  std::map<int64_t, NodeId> states;
  const std::vector<NodeId>& entries = fields_.pickle().entries(state);
  for (size_t i = 0; i + 1 < entries.size(); i += 2) {
    states.emplace(fields_.integer(entries[i], "state key"), entries[i + 1]);
  }
  read_slots(fields_.list(groups, "param_groups"),
             has_masters_ ? fields_.list(masters, "fp32_groups") : std::vector<NodeId>{}, states);
  for (Slot& slot : slots_) {
    if (slot.state != kNoNode) sort_state(&slot);
  }
  find_families();
  adopt_zero_dim_states();
}

void Zero0Reader::read_slots(const std::vector<NodeId>& hypers, const std::vector<NodeId>& masters,
                             const std::map<int64_t, NodeId>& states) {
  const auto same = [&](const std::string& what, size_t expected, size_t found) {
    if (!has_masters_ || expected == found) return;
    fields_.fail("The masters do not fit param_groups.", what, std::to_string(expected),
                 std::to_string(found));
  };
  same("fp32_groups", hypers.size(), masters.size());
  std::set<int64_t> used;
  const bool apart = std::ranges::any_of(
      hypers, [&](NodeId hyper) { return is_group_of_experts(fields_, hyper); });
  for (size_t group = 0; group < hypers.size(); ++group) {
    const std::string place = "fp32_groups[" + std::to_string(group) + "]";
    const std::vector<NodeId>& params =
        fields_.list(fields_.need(hypers[group], "params"), "params");
    std::vector<NodeId> tensors;
    if (has_masters_) tensors = fields_.list(masters[group], place);
    same(place, params.size(), tensors.size());
    for (size_t i = 0; i < params.size(); ++i) {
      Slot slot;
      slot.group = group;
      slot.index_local = i;
      if (apart) slot.expert = is_group_of_experts(fields_, hypers[group]);
      const int64_t index = fields_.integer(params[i], "params");
      if (!used.insert(index).second) {
        fields_.fail("A parameter stands twice in param_groups.", "params", "once",
                     std::to_string(index));
      }
      if (const auto found = states.find(index); found != states.end()) slot.state = found->second;
      if (has_masters_) slot.master = fields_.tensor(tensors[i], place);
      if (has_masters_) slot.shape = slot.master->shape;
      slots_.push_back(std::move(slot));
    }
    state_.groups.push_back({{file_, hypers[group]}, {}, {}});
  }
  for (const auto& [index, node] : states) {
    if (used.count(index) != 0) continue;
    refuse("The optimizer keeps state that belongs to no parameter.",
           "state[" + std::to_string(index) + "]", "a number of param_groups", "another");
  }
}

// Groups of experts one behind the other with equal settings were split by their size
// (expert_groups.h) where each is filled as far as that rule fills it.
void Zero0Reader::find_families() {
  ShardedState bare;
  bare.flavour = Flavour::kZero0;
  bare.files = state_.files;
  bare.optim_files = {file_};
  for (const GroupState& group : state_.groups) bare.groups.push_back({group.hyper, {}, {}});
  const nlohmann::json hyper = optimizer_json(bare).value("param_groups", nlohmann::json::array());
  const int64_t most =
      options_.moe_max_group_size > 0 ? options_.moe_max_group_size : kMoeMaxGroupSize;
  std::vector<int64_t> sizes(bare.groups.size(), 0), first(bare.groups.size(), 0);
  for (const Slot& slot : slots_) {
    const int64_t elements = slot.shape ? numel(*slot.shape) : 0;  // unknown: no split is proven
    if (slot.index_local == 0) first[slot.group] = elements;
    sizes[slot.group] += elements;
  }
  std::vector<size_t> families;
  for (size_t group = 0; group < bare.groups.size(); ++group) {
    const bool goes_on = group > 0 && hyper[group] == hyper[group - 1] &&
                         is_group_of_experts(fields_, bare.groups[group].hyper.node) &&
                         first[group] > most - sizes[group - 1];
    families.push_back(group == 0 ? 0 : families.back() + (goes_on ? 0 : 1));
  }
  for (Slot& slot : slots_) slot.family = families[slot.group];
}

void Zero0Reader::sort_state(Slot* slot) const {
  for (const auto& [key, node] : fields_.named(slot->state, "state of " + describe(*slot))) {
    const std::optional<TensorView> view = fields_.document().tensor(node);
    const Kind kind = fields_.pickle().kind(node);
    if (view && !view->shape.empty()) {
      if (!slot->shape) slot->shape = view->shape;
      if (*slot->shape != view->shape) {
        refuse("An optimizer state has another shape than its parameter (factored states?).",
               describe(*slot) + " " + quote(key), to_string(*slot->shape), to_string(view->shape));
      }
      slot->tensors.emplace_back(key, *view);
    } else if (view || kind == Kind::kInt || kind == Kind::kFloat || kind == Kind::kBool ||
               kind == Kind::kNone) {
      slot->scalars.emplace_back(key, node);
    } else {
      refuse("An optimizer state is neither a tensor nor a number.",
             describe(*slot) + " " + quote(key), "a tensor or a number", name(kind));
    }
  }
}

// A 0-d tensor is a number such as step, except where other slots have a tensor under its key: then
// the parameter itself is 0-d.
void Zero0Reader::adopt_zero_dim_states() {
  std::set<std::string> tensor_keys;
  for (const Slot& slot : slots_) {
    for (const auto& [key, view] : slot.tensors) tensor_keys.insert(key);
  }
  for (Slot& slot : slots_) {
    if (!slot.tensors.empty() || (slot.shape && !slot.shape->empty())) continue;
    std::erase_if(slot.scalars, [&](const auto& scalar) {
      const std::optional<TensorView> view = fields_.document().tensor(scalar.second);
      if (!view || tensor_keys.count(scalar.first) == 0) return false;
      slot.tensors.emplace_back(scalar.first, *view);
      slot.shape = Shape{};
      return true;
    });
  }
}

void Zero0Reader::add_parameter(const Slot& slot) {
  ModuleEntry& entry = entries_[slot.entry];
  entry.owned = true;
  const Leaf& leaf = entry.leaf;
  ParameterState parameter{.name = leaf.name,
                           .shape = leaf.shape,
                           .group = static_cast<int>(slot.group),
                           .model_dtype = leaf.dtype,
                           .states = {},
                           .scalars = {}};
  if (slot.master) {
    parameter.weight = add_leaf(leaf.name, "fp32", *slot.master);
    parameter.model_copy = add_entry(entry, "param");
  } else {
    parameter.weight = add_entry(entry, leaf.dtype == DType::kFloat32 ? "fp32" : "param");
  }
  for (const auto& [state, tensor] : slot.tensors) {
    parameter.states.push_back(add_leaf(leaf.name, state, tensor));
    state_.stepped = true;
  }
  for (const auto& [state, node] : slot.scalars) {
    parameter.scalars.push_back({state, {file_, node}});
  }
  state_.parameters.push_back(std::move(parameter));
  state_.enlist(static_cast<int>(state_.parameters.size()) - 1);
}

void Zero0Reader::add_frozen() {
  for (const ModuleEntry& entry : entries_) {
    if (entry.owned) continue;
    ParameterState frozen{.name = entry.leaf.name,
                          .shape = entry.leaf.shape,
                          .model_dtype = entry.leaf.dtype,
                          .states = {},
                          .scalars = {}};
    frozen.weight = add_entry(entry, "param");
    state_.parameters.push_back(std::move(frozen));
  }
}

}  // namespace

NodeId torch_state(const Fields& fields, NodeId optimizer) {
  const NodeId nested = fields.maybe(optimizer, "optimizer_state_dict");
  return nested == kNoNode ? optimizer : nested;
}

void read_zero0_rank(ShardedState* state, const ModelStates& model, const ExpertInfo& experts,
                     const Zero0Rank& rank, const ReadOptions& options, Storage& storage) {
  Zero0Reader(state, model, experts, rank, options, storage).run();
}

void read_zero0(ShardedState* state, const ModelStates& model, const ExpertInfo& experts,
                const ReadOptions& options, Storage& storage) {
  const Fields fields(state->document(model.file));
  const Zero0Rank rank{.optimizer = {model.file, fields.maybe(fields.root(), "optimizer")},
                       .experts = {}};
  if (!rank.optimizer.present() && !options.model_files_only)
    state->notices.push_back("the file holds no optimizer: every parameter is taken as frozen");
  read_zero0_rank(state, model, experts, rank, options, storage);
}

}  // namespace isoshard::checkpoint
