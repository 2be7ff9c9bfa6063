// Stage 0: the optimizer's state lies in the model file, by number and without parameter names
// (deepspeed/runtime/fp16/unfused_optimizer.py, state_dict). The names are inferred, then proven:
//
//   module            scale  buffer  embed  norm (frozen)  up  head (alias of embed)
//   candidates          A              B          C        D
//   group 0 (slots)                    0                   1      order inside a group is kept,
//   group 1 (slots)     0                                         groups may interleave
#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <tuple>

#include "checkpoint/deepspeed/master_compare.h"
#include "checkpoint/deepspeed/order_search.h"
#include "checkpoint/deepspeed/reader.h"
#include "checkpoint/deepspeed/zero_files.h"
#include "core/cast.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

// One parameter as the optimizer knows it: a number, and tensors of the parameter's shape.
struct Slot {
  size_t group = 0;
  size_t index_local = 0;      // in the group
  std::optional<Shape> shape;  // nothing: never stepped, and there is no master
  std::optional<TensorView> master;
  NodeId state = kNoNode;
  std::vector<std::pair<std::string, TensorView>> tensors;
  std::vector<std::pair<std::string, NodeId>> scalars;
  size_t entry = 0;  // number in the reader's entries, once assigned
};

// A tensor of the module that is neither buffer nor alias.
struct Entry {
  std::string name;
  TensorView view;
  bool owned = false;  // by the optimizer
};

std::string describe(const Slot& slot) {
  return "group " + std::to_string(slot.group) + " slot " + std::to_string(slot.index_local) + " " +
         (slot.shape ? to_string(*slot.shape) : "(shape unknown)");
}

std::string describe(const Entry& entry) {
  return quote(entry.name) + " " + to_string(entry.view.shape);
}

template <typename Item>
std::string describe_all(const std::vector<Item>& items) {
  std::string text = std::to_string(items.size()) + " in all";
  for (size_t i = 0; i < items.size() && i < 10; ++i) text += ", " + describe(items[i]);
  return items.size() > 10 ? text + ", …" : text;
}

class Zero0Reader {
 public:
  Zero0Reader(ShardedState* state, const ModelStates& model, const ReadOptions& options,
              Storage& storage)
      : state_(*state),
        model_(model),
        options_(options),
        storage_(storage),
        fields_(state->document(model.file)) {}

  void run();

 private:
  [[noreturn]] void refuse(ErrorCode code, const std::string& what, const std::string& entry,
                           const std::string& expected, const std::string& found) const;

  void read_module();
  void read_optimizer(NodeId optimizer);
  void read_slots(const std::vector<NodeId>& hypers, const std::vector<NodeId>& masters,
                  const std::map<int64_t, NodeId>& states);
  void sort_state(Slot* slot) const;
  void adopt_zero_dim_states();

  std::string infer();
  OrderSearch search(bool values);
  [[noreturn]] void explain(const OrderSearch& result, bool values) const;
  void take_order();
  bool fits_shape(const Slot& slot, const Entry& entry) const {
    return !slot.shape || *slot.shape == entry.view.shape;
  }
  const std::optional<Difference>& difference(size_t slot, size_t entry);
  void prove();

  int add_leaf(const std::string& name, const std::string& state, const TensorView& view);
  void add_parameter(const Slot& slot);
  void add_frozen();

  ShardedState& state_;
  const ModelStates& model_;
  const ReadOptions& options_;
  Storage& storage_;
  const Fields fields_;
  std::vector<Entry> entries_;
  std::vector<size_t> candidates_;  // entries that the search may assign
  std::vector<Slot> slots_;         // group by group
  std::vector<size_t> group_sizes_;
  bool has_masters_ = false;
  std::map<std::pair<size_t, size_t>, std::optional<Difference>> differences_;  // slot, entry
};

void Zero0Reader::run() {
  state_.flavour = Flavour::kZero0;
  state_.stage = 0;
  read_module();
  const NodeId optimizer = fields_.maybe(fields_.root(), "optimizer");
  if (options_.model_files_only) return add_frozen();
  if (optimizer == kNoNode) {
    state_.notices.push_back("the file holds no optimizer: every parameter is taken as frozen");
  } else {
    read_optimizer(optimizer);
    std::string evidence = "--param-order";
    if (options_.param_order.empty()) {
      evidence = infer();
    } else {
      take_order();
    }
    if (has_masters_ && options_.prove) {
      prove();
      evidence += "; every master, cast to the module's dtype, equals the module's bits";
    }
    state_.inferred.push_back("parameter names of the optimizer state: " + evidence);
    for (const Slot& slot : slots_) add_parameter(slot);
  }
  add_frozen();
}

void Zero0Reader::refuse(ErrorCode code, const std::string& what, const std::string& entry,
                         const std::string& expected, const std::string& found) const {
  throw Error(ErrorInfo{.code = code,
                        .what = what,
                        .file = fields_.document().path(),
                        .entry = entry,
                        .expected = expected,
                        .found = found,
                        .next = code == ErrorCode::kUnsupported
                                    ? "`isoshard help` lists what this version reads"
                                    : "say the order with --param-order FILE: one parameter name a "
                                      "line in the order of the optimizer's state, a blank line "
                                      "between groups; with it --force goes on from the masters"});
}

int Zero0Reader::add_leaf(const std::string& name, const std::string& state,
                          const TensorView& view) {
  return state_.add_leaf({.name = name,
                          .state = state,
                          .dtype = view.dtype,
                          .shape = view.shape,
                          .requires_grad = view.requires_grad,
                          .fragments = file_fragments(fields_.document(), model_.file, view)});
}

// Buffers and aliases go to the state at once. shared_params is None: an alias shows by its place.
void Zero0Reader::read_module() {
  std::map<std::tuple<int, int64_t, Shape, Shape>, std::string> first_names;
  std::set<std::string> names;
  for (const auto& [name, node] : model_.module) {
    const TensorView view = fields_.tensor(node, "module " + name);
    if (!names.insert(name).second) {
      fields_.fail("A name stands twice in the module.", quote(name), "once", "twice");
    }
    state_.module_order.push_back(name);
    if (model_.buffer_names.count(name) != 0) {
      state_.buffers.push_back({name, add_leaf(name, "buffer", view)});
      continue;
    }
    const auto [first, fresh] =
        first_names.emplace(std::tuple(view.storage, view.offset, view.shape, view.stride), name);
    if (fresh || numel(view.shape) == 0) {
      entries_.push_back({name, view});
    } else {
      state_.aliases.push_back({name, first->second, add_leaf(name, "param", view)});
    }
  }
}

void Zero0Reader::read_optimizer(NodeId optimizer) {
  const NodeId nested = fields_.maybe(optimizer, "optimizer_state_dict");
  const NodeId masters = fields_.maybe(optimizer, "fp32_groups");
  const NodeId base = nested == kNoNode ? optimizer : nested;
  const NodeId state = fields_.maybe(base, "state");
  const NodeId groups = fields_.maybe(base, "param_groups");
  has_masters_ = masters != kNoNode;
  if ((nested == kNoNode) == has_masters_ || state == kNoNode || groups == kNoNode) {
    const bool fused = fields_.maybe(optimizer, "fp32_groups_flat") != kNoNode;
    std::string keys;
    for (const auto& [key, node] : fields_.named(optimizer, "optimizer")) keys += quote(key) + " ";
    refuse(ErrorCode::kUnsupported,
           fused ? "The fused FP16_Optimizer of stage 0 (fp32_groups_flat) is not supported."
                 : "The optimizer's state has an unknown form.",
           "optimizer", "state, param_groups; or optimizer_state_dict, fp32_groups", keys);
  }
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
    group_sizes_.push_back(params.size());
    state_.groups.push_back({{model_.file, hypers[group]}, {}, {}});
  }
  for (const auto& [index, node] : states) {
    if (used.count(index) != 0) continue;
    refuse(ErrorCode::kUnsupported, "The optimizer keeps state that belongs to no parameter.",
           "state[" + std::to_string(index) + "]", "a number of param_groups", "another");
  }
}

void Zero0Reader::sort_state(Slot* slot) const {
  for (const auto& [key, node] : fields_.named(slot->state, "state of " + describe(*slot))) {
    const std::optional<TensorView> view = fields_.document().tensor(node);
    const Kind kind = fields_.pickle().kind(node);
    if (view && !view->shape.empty()) {
      if (!slot->shape) slot->shape = view->shape;
      if (*slot->shape != view->shape) {
        refuse(ErrorCode::kUnsupported,
               "An optimizer state has another shape than its parameter (factored states?).",
               describe(*slot) + " " + quote(key), to_string(*slot->shape), to_string(view->shape));
      }
      slot->tensors.emplace_back(key, *view);
    } else if (view || kind == Kind::kInt || kind == Kind::kFloat || kind == Kind::kBool ||
               kind == Kind::kNone) {
      slot->scalars.emplace_back(key, node);
    } else {
      refuse(ErrorCode::kUnsupported, "An optimizer state is neither a tensor nor a number.",
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

const std::optional<Difference>& Zero0Reader::difference(size_t slot, size_t entry) {
  const auto [found, fresh] = differences_.try_emplace({slot, entry});
  if (!fresh) return found->second;
  const TensorView& master = *slots_[slot].master;
  const TensorView& module = entries_[entry].view;
  if (!can_cast(master.dtype, module.dtype)) {
    refuse(ErrorCode::kUnsupported, "A master cannot be cast to its parameter's dtype.",
           quote(entries_[entry].name), name(module.dtype), name(master.dtype));
  }
  found->second = compare(fields_.document(), master, module);
  return found->second;
}

OrderSearch Zero0Reader::search(bool values) {
  return OrderSearch(group_sizes_, candidates_.size(), [&, values](size_t slot, size_t candidate) {
    const size_t entry = candidates_[candidate];
    return fits_shape(slots_[slot], entries_[entry]) && (!values || !difference(slot, entry));
  });
}

// Returns the evidence. Values decide only where shapes do not: reading them takes time.
std::string Zero0Reader::infer() {
  bool values = false;
  OrderSearch result;
  // Entries without elements are owned by a plain torch optimizer, and in older DeepSpeed.
  for (const bool empty_ones : {false, true}) {
    candidates_.clear();
    for (size_t i = 0; i < entries_.size(); ++i) {
      if (empty_ones || numel(entries_[i].view.shape) > 0) candidates_.push_back(i);
    }
    result = search(values);
    if (result.too_many || !result.orders.empty()) break;
  }
  if (has_masters_ && (result.too_many || result.orders.size() > 1)) {
    values = true;
    result = search(values);
  }
  if (result.orders.size() != 1) explain(result, values);
  size_t unknown = 0;
  for (size_t slot = 0; slot < slots_.size(); ++slot) {
    slots_[slot].entry = candidates_[result.orders[0][slot]];
    if (!slots_[slot].shape) ++unknown;
  }
  if (values) return "registration order, and the only assignment that fits the masters' values";
  std::string evidence = "registration order, and the only assignment that fits the shapes";
  if (unknown > 0) evidence += " (" + std::to_string(unknown) + " slots have none: never stepped)";
  return evidence;
}

void Zero0Reader::explain(const OrderSearch& result, bool values) const {
  const std::string law = values ? "the shapes and the masters' values" : "the shapes";
  std::string what = "The optimizer's state names no parameters, and ";
  if (result.too_many) {
    what += "there are too many assignments that fit " + law + ".";
  } else if (result.stuck) {
    what += describe(slots_[*result.stuck]) + " has no place in registration order by " + law + ".";
  } else if (result.orders.empty()) {
    what += "no assignment in registration order fits " + law + ".";
  } else {
    const auto [a, b] = std::ranges::mismatch(result.orders[0], result.orders[1]);
    const Slot& slot = slots_[static_cast<size_t>(a - result.orders[0].begin())];
    what += "several assignments fit " + law + ": " + describe(slot) + " may be " +
            quote(entries_[candidates_[*a]].name) + " or " + quote(entries_[candidates_[*b]].name) +
            ".";
  }
  refuse(ErrorCode::kMismatch, what, "optimizer",
         "one way to name the optimizer's slots, " + describe_all(slots_),
         "module entries, " + describe_all(entries_));
}

// The file names every slot; its names, groups and shapes are checked here, values by prove().
void Zero0Reader::take_order() {
  const std::string text = read_small_file(storage_, options_.param_order, int64_t{64} << 20);
  std::vector<std::string> names;
  std::string expected, found;  // sizes of the groups
  size_t begin_of_group = 0;
  const auto end_group = [&] {
    if (names.size() > begin_of_group) found += std::to_string(names.size() - begin_of_group) + " ";
    begin_of_group = names.size();
  };
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    std::string line = text.substr(begin, end - begin);
    if (!line.empty() && line.back() == '\r') line.pop_back();
    line.empty() ? end_group() : names.push_back(line);
    begin = end + 1;
  }
  end_group();
  for (size_t size : group_sizes_) expected += size == 0 ? "" : std::to_string(size) + " ";
  if (expected != found) {
    refuse(ErrorCode::kMismatch, "The order has other groups than the optimizer.",
           options_.param_order, "names by group: " + expected, found);
  }
  std::map<std::string, size_t> numbers;
  for (size_t i = 0; i < entries_.size(); ++i) numbers.emplace(entries_[i].name, i);
  for (size_t i = 0; i < slots_.size(); ++i) {
    const auto number = numbers.find(names[i]);
    if (number == numbers.end()) {
      refuse(ErrorCode::kMismatch, "The order has a name that is no parameter, or has it twice.",
             options_.param_order, "module entries, " + describe_all(entries_), quote(names[i]));
    }
    slots_[i].entry = number->second;
    numbers.erase(number);
    const Entry& entry = entries_[slots_[i].entry];
    if (fits_shape(slots_[i], entry)) continue;
    refuse(ErrorCode::kMismatch, "The order names a parameter of another shape.",
           options_.param_order, describe(slots_[i]), describe(entry));
  }
}

void Zero0Reader::prove() {
  for (size_t i = 0; i < slots_.size(); ++i) {
    const Entry& entry = entries_[slots_[i].entry];
    const std::optional<Difference>& wrong = difference(i, slots_[i].entry);
    if (!wrong) continue;
    refuse(ErrorCode::kMismatch,
           "A parameter's master does not agree with the module: the order is another, or bytes "
           "are damaged.",
           quote(entry.name) + " element " + std::to_string(wrong->element),
           "bits " + wrong->expected + ", the master (" + describe(slots_[i]) + ") cast to " +
               name(entry.view.dtype),
           "bits " + wrong->found);
  }
}

void Zero0Reader::add_parameter(const Slot& slot) {
  Entry& entry = entries_[slot.entry];
  entry.owned = true;
  const TensorView& view = entry.view;
  ParameterState parameter{.name = entry.name,
                           .shape = view.shape,
                           .group = static_cast<int>(slot.group),
                           .model_dtype = view.dtype,
                           .states = {},
                           .scalars = {}};
  if (slot.master) {
    parameter.weight = add_leaf(entry.name, "fp32", *slot.master);
    parameter.model_copy = add_leaf(entry.name, "param", view);
  } else {
    const bool single = view.dtype == DType::kFloat32;
    parameter.weight = add_leaf(entry.name, single ? "fp32" : "param", view);
  }
  for (const auto& [state, tensor] : slot.tensors) {
    parameter.states.push_back(add_leaf(entry.name, state, tensor));
    state_.stepped = true;
  }
  for (const auto& [state, node] : slot.scalars) {
    parameter.scalars.push_back({state, {model_.file, node}});
  }
  GroupState& group = state_.groups[slot.group];
  group.parameters.push_back(static_cast<int>(state_.parameters.size()));
  group.flat_order.push_back(group.parameters.back());
  state_.parameters.push_back(std::move(parameter));
}

void Zero0Reader::add_frozen() {
  for (const auto& [name, view, owned] : entries_) {
    if (owned) continue;
    ParameterState frozen{
        .name = name, .shape = view.shape, .model_dtype = view.dtype, .states = {}, .scalars = {}};
    frozen.weight = add_leaf(name, "param", view);
    state_.parameters.push_back(std::move(frozen));
  }
}

}  // namespace

void read_zero0(ShardedState* state, const ModelStates& model, const ReadOptions& options,
                Storage& storage) {
  Zero0Reader(state, model, options, storage).run();
}

}  // namespace isoshard::checkpoint
