// The leaves of a checkpoint as diff sees them: by section and name, aliases resolved, buffers of a
// weights file told from its weights by the other side's knowledge.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "checkpoint/sharded_state.h"

namespace isoshard::reshard {

struct LogicalLeaf {
  std::string name;
  std::string state;  // "weight", "buffer", "exp_avg", …
  int leaf = -1;
};

struct LogicalLeaves {
  // section → its leaves in the order of the flat buffers, then of the module.
  std::map<std::string, std::vector<LogicalLeaf>> sections;
  std::map<std::string, std::string> aliases;                 // alias → parameter
  std::map<std::string, std::map<std::string, int>> by_name;  // section → name → leaf

  // The leaf of a name; of an alias, that of its parameter; −1 if there is none.
  int find(const std::string& section, const std::string& name) const;
};

// `other` is the side that `state` is compared with.
LogicalLeaves logical_leaves(const checkpoint::ShardedState& state,
                             const checkpoint::ShardedState& other);

// Parameters in the order of the saved flat buffers; then those that the optimizer does not own.
std::vector<int> parameters_in_flat_order(const checkpoint::ShardedState& state);

}  // namespace isoshard::reshard
