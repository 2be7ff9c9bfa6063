// See logical_leaves.h.
#include "reshard/logical_leaves.h"

#include <set>

namespace isoshard::reshard {

using checkpoint::Flavour;
using checkpoint::ParameterState;
using checkpoint::ShardedState;

int LogicalLeaves::find(const std::string& section, const std::string& name) const {
  const auto leaves = by_name.find(section);
  if (leaves == by_name.end()) return -1;
  if (const auto leaf = leaves->second.find(name); leaf != leaves->second.end()) {
    return leaf->second;
  }
  const auto alias = aliases.find(name);
  if (alias == aliases.end()) return -1;
  const auto leaf = leaves->second.find(alias->second);
  return leaf == leaves->second.end() ? -1 : leaf->second;
}

std::vector<int> parameters_in_flat_order(const ShardedState& state) {
  std::vector<int> order;
  std::vector<bool> seen(state.parameters.size(), false);
  for (const checkpoint::GroupState& group : state.groups) {
    for (int number : group.flat_order) {
      order.push_back(number);
      seen[static_cast<size_t>(number)] = true;
    }
  }
  for (size_t i = 0; i < seen.size(); ++i) {
    if (!seen[i]) order.push_back(static_cast<int>(i));
  }
  return order;
}

LogicalLeaves logical_leaves(const ShardedState& state, const ShardedState& other) {
  LogicalLeaves result;
  std::set<std::string> buffers;
  if (state.flavour == Flavour::kWeights) {
    for (const checkpoint::BufferState& buffer : other.buffers) buffers.insert(buffer.name);
  }
  const auto add = [&](const std::string& section, const LogicalLeaf& leaf) {
    result.sections[section].push_back(leaf);
    result.by_name[section].emplace(leaf.name, leaf.leaf);
  };
  for (int number : parameters_in_flat_order(state)) {
    const ParameterState& parameter = state.parameters[static_cast<size_t>(number)];
    if (buffers.count(parameter.name) != 0) {
      add("buffers", {parameter.name, "buffer", parameter.weight});
      continue;
    }
    add("weights", {parameter.name, "weight", parameter.weight});
    for (int leaf : parameter.states) {
      add(state.leaf(leaf).state, {parameter.name, state.leaf(leaf).state, leaf});
    }
  }
  for (const checkpoint::BufferState& buffer : state.buffers) {
    add("buffers", {buffer.name, "buffer", buffer.leaf});
  }
  for (const checkpoint::Alias& alias : state.aliases) {
    result.aliases.emplace(alias.name, alias.target);
  }
  return result;
}

}  // namespace isoshard::reshard
