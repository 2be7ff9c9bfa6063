// What must be true of files and states of a made-up job. Every function returns "" when it is,
// otherwise one sentence with tensor, state, global index, place, expected and actual bits.
#pragma once

#include <string>

#include "checkpoint/sharded_state.h"
#include "properties/model.h"

namespace isoshard::properties {

// A state that was read back: every parameter, state, scalar, buffer, alias and group is there and
// nothing else, each element with its own bits. Verifies neither hyper-parameters nor padding.
std::string state_difference(const checkpoint::ShardedState& state, const Model& model);

// The files of a tag folder against the reference's partition, storage by storage, padding (which
// must be zero) included; lengths, paddings, shapes and slice maps too. Stages 1 to 3; at stage 0
// there is no partition and nothing is compared. Does not verify the pickles' other keys.
std::string file_difference(Storage& storage, const std::string& folder, const Model& model,
                            const Job& job);

// fp32 weights read back: every name of the module with its value cast to float32.
std::string weights_difference(const checkpoint::ShardedState& state, const Model& model);

// The first padding element of a source that stands in a storage of these files.
std::string poison_difference(const checkpoint::ShardedState& state);

// Two folders: the same names with the same bytes.
std::string folder_difference(Storage& storage, const std::string& expected,
                              const std::string& actual);

// All bytes of a leaf, row-major.
std::string leaf_bytes(const checkpoint::ShardedState& state, int leaf);

}  // namespace isoshard::properties
