// See migration.h.
#include "checkpoint/deepspeed/migration.h"

#include <algorithm>
#include <map>
#include <set>

#include "checkpoint/deepspeed/expert_groups.h"
#include "checkpoint/deepspeed/reader.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

constexpr const char* kMatrices[] = {".w1", ".w2", ".w3"};

class Migrant {
 public:
  Migrant(ShardedState* state, NameMap* names)
      : state_(*state), names_(*names), scalar_texts_(*state) {}

  Migration run() {
    check_source();
    sort_names();
    for (const std::string& prefix : prefixes_) add_layer(prefix);
    for (const std::string& prefix : prefixes_) {
      for (const char* matrix : kMatrices) add_stack(prefix, prefix + matrix);
    }
    rebuild();
    return std::move(result_);
  }

 private:
  [[noreturn]] void refuse(ErrorCode code, const std::string& what, const std::string& entry,
                           const std::string& expected, const std::string& found) const {
    throw Error(ErrorInfo{.code = code,
                          .what = what,
                          .file = state_.folder,
                          .entry = entry,
                          .expected = expected,
                          .found = found,
                          .safe = "nothing was written",
                          .next = "look at the map, and at isoshard inspect --json SOURCE"});
  }

  void check_source() const;
  void sort_names();
  void check_number(const std::string& name, const NameMap::Found& found);
  void check_router(const ExpertLayer& layer, const std::vector<ParameterState>& parameters) const;
  void check_second_name(const std::string& name, const std::string& second) const;
  void add_layer(const std::string& prefix);
  void add_stack(const std::string& prefix, const std::string& name);
  int stack_leaves(const std::string& name, const std::vector<int>& leaves, const Shape& shape);
  void rebuild();
  std::string renamed(const std::string& name);
  const ParameterState& expert(const std::string& stack, int64_t id) const {
    return state_.parameters[experts_.at(stack).at(id)];
  }

  ShardedState& state_;
  NameMap& names_;
  ScalarTexts scalar_texts_;
  Migration result_;
  std::map<std::string, std::map<int64_t, size_t>> experts_;  // stack → number → parameter
  std::vector<std::string> prefixes_;                         // of the layers, in order
  std::map<std::string, NameMap::Found> others_;              // old name → what the map says
  std::map<std::string, ParameterState> stacks_;
  std::map<std::string, std::string> layer_of_stack_;  // native
};

void Migrant::check_source() const {
  const bool known = state_.flavour == Flavour::kZero12 && !state_.model_files_only;
  if (state_.expert_layout == ExpertLayout::kNative && known) return;
  refuse(ErrorCode::kUnsupported, "Only native MoE of stages 1 and 2 is migrated.", "",
         "a ZeRO checkpoint of native MoE",
         std::string(isoshard::checkpoint::name(state_.flavour)) +
             (state_.expert_layout == ExpertLayout::kAutoEp ? " of AutoEP already"
              : state_.expert_layout == ExpertLayout::kNone ? " without experts"
                                                            : ""));
}

void Migrant::sort_names() {
  std::vector<std::string> all, unmatched;
  std::set<std::string> taken;
  const auto claim = [&](const std::string& name, const std::string& by) {
    if (!taken.insert(name).second)
      refuse(ErrorCode::kMismatch, "Two parameters would get one name.", quote(name), "once", by);
  };
  for (size_t i = 0; i < state_.parameters.size(); ++i) {
    const std::string& name = state_.parameters[i].name;
    all.push_back(name);
    std::optional<NameMap::Found> found = names_.find(name);
    const bool native = ExpertInfo::expert_number(name).has_value();
    if (native && (!found || !found->expert)) unmatched.push_back(name);
    if (!native && found && found->expert)
      refuse(ErrorCode::kMismatch, "A rule for experts fits a parameter that is none.", quote(name),
             "names of deepspeed_experts", quote(found->name));
    if (found && found->expert) {
      check_number(name, *found);
      if (!experts_[found->name].emplace(*found->expert, i).second)
        refuse(ErrorCode::kMismatch, "Two experts would get one place.", quote(found->name),
               "each number once", quote(name));
      const std::string prefix = found->name.substr(0, found->name.rfind('.'));
      if (std::ranges::find(prefixes_, prefix) == prefixes_.end()) prefixes_.push_back(prefix);
      continue;
    }
    if (found) {
      others_.emplace(name, *found);
      for (const std::string& second : found->also) claim(second, quote(name));
    }
    claim(found ? found->name : name, quote(name));
  }
  for (const auto& [stack, experts] : experts_) claim(stack, "a stack of experts and another");
  for (const BufferState& buffer : state_.buffers) {
    all.push_back(buffer.name);
    if (const auto found = names_.find(buffer.name)) others_.emplace(buffer.name, *found);
  }
  names_.check(all, unmatched);
}

// {expert} stands where the expert's number does, and a stack comes from one layer.
void Migrant::check_number(const std::string& name, const NameMap::Found& found) {
  const auto native = ExpertInfo::expert_number(name);
  const auto [layer, fresh] = layer_of_stack_.emplace(found.name, native->first);
  if (native->second == *found.expert && layer->second == native->first) return;
  refuse(ErrorCode::kMismatch, "A rule takes another number for an expert's.", quote(name),
         "{expert} = " + std::to_string(native->second) + " of " + quote(layer->second),
         std::to_string(*found.expert) + " of " + quote(native->first));
}

// w1, w2, w3 of one layer: the same number of experts, and shapes that belong together.
void Migrant::add_layer(const std::string& prefix) {
  const std::string end = ".experts";
  if (!prefix.ends_with(end) || prefix == end)
    refuse(ErrorCode::kMismatch, "AutoEP's stacks lie in a module that is called experts.",
           quote(prefix), "….experts.w1", quote(prefix));
  size_t count = 0;
  Shape shapes[3];
  for (int m = 0; m < 3; ++m) {
    const auto stack = experts_.find(prefix + kMatrices[m]);
    if (stack == experts_.end())
      refuse(ErrorCode::kMismatch,
             "A layer lacks one of AutoEP's three matrices (gate, down, up): an expert without a "
             "gate, or with biases, is none that AutoEP can train.",
             quote(prefix + kMatrices[m]), "a rule for w1, w2 and w3", "none");
    if (m == 0) count = stack->second.size();
    const auto last = static_cast<size_t>(stack->second.rbegin()->first) + 1;
    if (stack->second.size() != count || last != count)
      refuse(ErrorCode::kMismatch, "A layer's experts are not numbered through.",
             quote(stack->first), "experts 0 to " + std::to_string(count - 1),
             std::to_string(stack->second.size()) + " up to " + std::to_string(last - 1));
    shapes[m] = expert(stack->first, 0).shape;
  }
  const bool fits = shapes[0].size() == 2 && shapes[0] == shapes[2] &&
                    shapes[1] == Shape{shapes[0][1], shapes[0][0]};
  if (!fits)
    refuse(ErrorCode::kMismatch, "The matrices of a layer do not belong together.", quote(prefix),
           "w1 and w3 [F, H], w2 [H, F]",
           to_string(shapes[0]) + ", " + to_string(shapes[2]) + ", " + to_string(shapes[1]));
  for (const auto& [stack, experts] : experts_) {
    const bool other = stack.starts_with(prefix + ".") && stack != prefix + ".w1" &&
                       stack != prefix + ".w2" && stack != prefix + ".w3";
    if (other)
      refuse(ErrorCode::kMismatch, "AutoEP has no place for this of an expert.", quote(stack),
             "w1, w2 and w3 alone", quote(expert(stack, experts.begin()->first).name));
  }
  ExpertLayer layer;
  layer.layer_id = static_cast<int64_t>(result_.layers.size());
  layer.prefix = prefix;
  layer.module_path = prefix.substr(0, prefix.size() - end.size());
  layer.experts = static_cast<int64_t>(count);
  layer.ep_size = state_.topology.expert;
  layer.placement = placed_in_blocks(layer.experts, layer.ep_size);
  result_.layers.push_back(std::move(layer));
}

// One leaf of leaves of the same kind, one an expert.
int Migrant::stack_leaves(const std::string& name, const std::vector<int>& leaves,
                          const Shape& shape) {
  Leaf stack = state_.leaf(leaves.at(0));
  stack.name = name;
  stack.shape = shape;
  stack.fragments.clear();
  int64_t begin = 0;
  for (int number : leaves) {
    const Leaf& leaf = state_.leaf(number);
    if (leaf.dtype != stack.dtype || leaf.state != stack.state)
      refuse(ErrorCode::kMismatch, "Experts of one stack have different states.", quote(leaf.name),
             stack.state + " " + isoshard::name(stack.dtype),
             leaf.state + " " + isoshard::name(leaf.dtype));
    for (FileFragment fragment : leaf.fragments) {
      fragment.begin += begin;
      stack.fragments.push_back(fragment);
    }
    begin += leaf.size_elements();
  }
  return state_.add_leaf(std::move(stack));
}

void Migrant::add_stack(const std::string& prefix, const std::string& name) {
  const auto layer = std::ranges::find(result_.layers, prefix, &ExpertLayer::prefix);
  const ParameterState lead = expert(name, 0);
  ParameterState stack = lead;
  stack.name = name;
  stack.shape = {layer->experts, lead.shape[0], lead.shape[1]};
  std::vector<int> weights, copies;
  std::vector<std::vector<int>> states(lead.states.size());
  const std::string step = scalar_texts_.of(lead.scalars);
  for (int64_t id = 0; id < layer->experts; ++id) {
    const ParameterState& one = expert(name, id);
    if (one.shape != lead.shape || one.group != lead.group || one.model_dtype != lead.model_dtype ||
        one.states.size() != lead.states.size())
      refuse(ErrorCode::kMismatch, "Experts of one stack differ in shape, dtype or group.",
             quote(one.name), to_string(lead.shape), to_string(one.shape));
    if (scalar_texts_.of(one.scalars) != step)
      refuse(ErrorCode::kMismatch, "Experts of one stack stand at different steps.",
             quote(one.name), step, scalar_texts_.of(one.scalars));
    weights.push_back(one.weight);
    copies.push_back(one.model_copy);
    for (size_t s = 0; s < states.size(); ++s) {
      const std::string& state = state_.leaf(lead.states[s]).state;
      states[s].push_back(state_.state_leaf(one, state));
      if (states[s].back() < 0)
        refuse(ErrorCode::kMismatch, "Experts of one stack have different states.", quote(one.name),
               state, "absent");
    }
    result_.renamed.push_back(quote(name) + "[" + std::to_string(id) + "]: " + quote(one.name));
  }
  stack.weight = stack_leaves(name, weights, stack.shape);
  if (lead.model_copy >= 0) stack.model_copy = stack_leaves(name, copies, stack.shape);
  for (size_t s = 0; s < states.size(); ++s)
    stack.states[s] = stack_leaves(name, states[s], stack.shape);
  stack.split = static_cast<int>(state_.splits.size());
  state_.splits.push_back(stack_split(*layer, lead.shape[0], lead.shape[1]));
  stacks_.emplace(name, std::move(stack));
}

std::string Migrant::renamed(const std::string& name) {
  const auto found = others_.find(name);
  if (found == others_.end()) return name;
  result_.renamed.push_back(quote(found->second.name) + ": " + quote(name));
  return found->second.name;
}

void Migrant::check_router(const ExpertLayer& layer,
                           const std::vector<ParameterState>& parameters) const {
  const std::string name = layer.module_path + ".router.gate.weight";
  const auto found = std::ranges::find(parameters, name, &ParameterState::name);
  const bool fits =
      found != parameters.end() && found->shape.size() == 2 && found->shape[0] == layer.experts;
  if (!fits)
    refuse(ErrorCode::kMismatch, "A layer has no router for its experts.", quote(name),
           "[" + std::to_string(layer.experts) + ", H], by a rule of names",
           found == parameters.end() ? "none" : to_string(found->shape));
}

// A second name as AutoEP leaves it: of a router, in another child of the same module.
void Migrant::check_second_name(const std::string& name, const std::string& second) const {
  for (const ExpertLayer& layer : result_.layers) {
    const std::string front = layer.module_path + ".", router = front + "router";
    if (!name.starts_with(router + ".") || !second.starts_with(front)) continue;
    const size_t dot = second.find('.', front.size());
    if (dot != std::string::npos && second.substr(dot) == name.substr(router.size()) &&
        second != name)
      return;
  }
  refuse(ErrorCode::kMismatch, "A second name is none that AutoEP gives.", quote(second),
         "that of a router in its layer, such as <layer>.gate.gate.weight", "for " + quote(name));
}

// Stacks take the place of their experts; what lies in a layer otherwise (its router) comes last in
// its group, as AutoEP adds its own parameters behind the model's.
void Migrant::rebuild() {
  std::map<std::string, std::vector<std::string>> also;  // new name → second names
  std::map<std::string, std::string> now;                // old name → new name
  std::vector<ParameterState> parameters, last;
  for (const ParameterState& parameter : state_.parameters) {
    if (ExpertInfo::expert_number(parameter.name)) continue;
    ParameterState kept = parameter;
    kept.name = now[parameter.name] = renamed(parameter.name);
    for (int leaf : {kept.weight, kept.model_copy}) {
      if (leaf >= 0) state_.leaf(leaf).name = kept.name;
    }
    for (int leaf : kept.states) state_.leaf(leaf).name = kept.name;
    if (const auto found = others_.find(parameter.name); found != others_.end())
      also[kept.name] = found->second.also;
    const bool inside = std::ranges::any_of(result_.layers, [&](const ExpertLayer& layer) {
      return kept.name.starts_with(layer.module_path + ".") && kept.group >= 0;
    });
    (inside ? last : parameters).push_back(std::move(kept));
  }
  parameters.insert(parameters.end(), last.begin(), last.end());
  for (const ExpertLayer& layer : result_.layers) check_router(layer, parameters);
  for (const std::string& prefix : prefixes_) {
    for (const char* matrix : kMatrices) parameters.push_back(stacks_.at(prefix + matrix));
  }
  for (GroupState& group : state_.groups) {
    group.parameters.clear();
    group.flat_order.clear();
  }
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (parameters[i].group < 0) continue;
    GroupState& group = state_.groups[static_cast<size_t>(parameters[i].group)];
    group.parameters.push_back(static_cast<int>(i));
    group.flat_order.push_back(static_cast<int>(i));
  }
  for (BufferState& buffer : state_.buffers) {
    now[buffer.name] = renamed(buffer.name);
    buffer.name = now[buffer.name];
    state_.leaf(buffer.leaf).name = buffer.name;
  }
  for (Alias& alias : state_.aliases) {
    if (const auto found = now.find(alias.target); found != now.end()) alias.target = found->second;
  }
  std::vector<std::string> order;
  for (const std::string& name : state_.module_order) {
    const auto found = now.find(name);
    order.push_back(found == now.end() ? name : found->second);
    for (const std::string& second : also[order.back()]) {
      check_second_name(order.back(), second);
      order.push_back(second);
      state_.aliases.push_back({second, found->second, -1, /*recorded=*/false});
    }
  }
  state_.module_order = std::move(order);
  state_.expert_layout = ExpertLayout::kAutoEp;
  state_.set_parameters(std::move(parameters));
}

}  // namespace

Migration migrate_to_autoep(ShardedState* state, NameMap* names, int64_t most) {
  // A stack has experts of several groups, where there are several.
  const size_t groups = state->groups.size();
  if (auto joined = group_experts_anew(*state, 1, 0)) *state = std::move(*joined);
  Migration migration = Migrant(state, names).run();
  // As many groups as any run has: DeepSpeed's load leaves out those that the file has too few of.
  if (auto split = group_experts_anew(*state, 1, most)) *state = std::move(*split);
  check_scheduler(*state, groups, state->groups.size());
  return migration;
}

}  // namespace isoshard::checkpoint
