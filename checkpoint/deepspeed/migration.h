// Experts of native MoE under the names of AutoEP: one by one, as DeepSpeed's MoE trains them, they
// become the stacks w1 (gate), w2 (down), w3 (up) of an AutoEP layer, with their moments and steps.
// The result is written in the universal form, which AutoEP loads by name, whatever the order of
// its optimizer.
#pragma once

#include <string>
#include <vector>

#include "checkpoint/blueprint.h"
#include "checkpoint/deepspeed/experts.h"
#include "checkpoint/deepspeed/name_map.h"
#include "checkpoint/sharded_state.h"

namespace isoshard::checkpoint {

struct Migration {
  std::vector<ExpertLayer> layers;
  std::vector<std::string> renamed;  // "new name: old name" for each
};

// Renames and stacks the state's parameters as the map says. Throws Error(kUnsupported, kMismatch)
// where the source is no native MoE of stage 1 or 2, where names and map do not meet, or where the
// experts do not make AutoEP's three matrices. Groups of experts hold up to `most` elements, as
// those of one expert-parallel rank (expert_groups.h).
Migration migrate_to_autoep(ShardedState* state, NameMap* names, int64_t most);

// The universal form of the migrated state.
TargetFiles migration_blueprints(const ShardedState& state, const Migration& migration);

}  // namespace isoshard::checkpoint
