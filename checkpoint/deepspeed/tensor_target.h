// How a target of several tensor-parallel ranks cuts every parameter: the kinds of split that the
// source records, with the widths of AutoTP's rule (deepspeed/module_inject/tp_shard.py). What the
// rule depends on and no checkpoint records, the number of key-value heads, must be told or must
// not matter; and the rule must give the source's own widths at the source's degree.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "checkpoint/sharded_state.h"

namespace isoshard::checkpoint {

struct SplitOptions {
  int64_t kv_heads = -1;        // --num-kv-heads; 0: the model names none; −1: not told
  int64_t grain = 0;            // --tp-grain-size; 0: as ds_config says, otherwise 1
  int64_t vocabulary_rows = 0;  // --padded-vocab-size; 0: as many as there are
};

// By number of the parameter. Throws Error(kUsage) where the widths are not determined,
// Error(kMismatch) with both width lists where the rule does not give the source's, and
// Error(kUnsupported) where the source does not say how its tensors are to be cut. What was
// inferred goes to `inferred`.
std::vector<AffineMap> target_maps(const ShardedState& state, int ranks,
                                   const SplitOptions& options, std::vector<std::string>* inferred);

// The sub-parameters' widths of the target, for universal_checkpoint_info.
Widths widths_of(const TensorSplit& split, const AffineMap& target);

// Takes the splits of another checkpoint of the same model (--split-like), for a source of one
// tensor-parallel rank, which records none.
void adopt_splits(ShardedState* state, const ShardedState& other);

}  // namespace isoshard::checkpoint
