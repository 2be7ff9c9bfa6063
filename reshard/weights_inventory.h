// Files of weights, cut into numbered parts: are all parts there, and does the index agree?
//
//   model-00001-of-00002.safetensors  model-00002-of-00002.safetensors model.safetensors.index.json
#pragma once

#include <string>
#include <vector>

#include "checkpoint/sharded_state.h"
#include "core/storage.h"

namespace isoshard::reshard {

struct WeightsInventory {
  std::vector<std::string> missing;  // parts, or tensors that the index names
  std::vector<std::string> odd;      // tensors that the index puts elsewhere or does not know
  bool has_index = false;
};

// `state` has the folder's files open. Throws Error(kCorrupt) for an index that is no JSON.
WeightsInventory take_weights_inventory(Storage& storage, const checkpoint::ShardedState& state);

}  // namespace isoshard::reshard
