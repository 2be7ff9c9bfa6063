// Whether a universal folder has every state of every parameter.
#pragma once

#include <optional>
#include <set>
#include <string>
#include <vector>

#include "checkpoint/deepspeed/reader.h"

namespace isoshard::checkpoint {

// The files of states, "zero/NAME/STATE.pt", depth first: a name may contain '/', so that a folder
// may hold both states and further folders.
std::vector<std::string> universal_state_files(Storage& storage, const std::string& folder);

// The paths in the folder's manifest; none where it has none, or one that is damaged, which verify
// tells.
std::optional<std::set<std::string>> listed_files(Storage& storage, const std::string& folder);

// States that a parameter lacks and others with its settings have, each with one that has it; what
// isoshard left out, its folder's manifest does not list.
struct LackingState {
  std::string file;  // zero/NAME/STATE.pt
  std::string owner;
};
std::vector<LackingState> lacking_universal_states(const ShardedState& state, Storage& storage);

// Every parameter of a group has the group's states, tensors and numbers alike. Error(kIncomplete)
// for the first that is missing, or a notice with ReadOptions::lost_experts.
void check_universal_states(ShardedState* state, Storage& storage, const ReadOptions& options);

}  // namespace isoshard::checkpoint
