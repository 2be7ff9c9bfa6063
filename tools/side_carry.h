// What lies beside a tag folder and belongs to the run: a Trainer's or Accelerate's own files.
#pragma once

#include <string>

#include "checkpoint/sharded_state.h"
#include "core/topology.h"
#include "reshard/convert.h"
#include "tools/session.h"

namespace isoshard::tools {

// Adds the regular files of a Trainer's checkpoint-N (trainer_state.json is there) or of a folder
// of Accelerate's (random_states_0.pkl) to the conversion: they come to stand in `save_folder`.
// What differs from a file there already is refused unless `overwrite`. States of random generators
// that do not fit the target's ranks are told and go along.
void carry_side_files(Session* session, const checkpoint::ShardedState& state,
                      const std::string& save_folder, const Topology& target, bool overwrite,
                      reshard::ConvertOptions* options);

}  // namespace isoshard::tools
