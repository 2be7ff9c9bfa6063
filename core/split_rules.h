// How an axis is cut over tensor-parallel ranks: two conventions that give other widths where the
// axis does not divide, as explicit types, so that one is never taken for the other.
//
//   remainder first   10 over 4 → 3 3 2 2    AutoTP (deepspeed/module_inject/tp_shard.py)
//   ceil              10 over 4 → 3 3 3 1    torch.chunk
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace isoshard {

// What AutoTP's rule depends on besides the axis; the model's, not the checkpoint's.
struct RemainderFirst {
  int64_t kv_heads = 0;  // num_key_value_heads; 0: none is known
  int64_t grain = 1;     // tp_grain_size: widths are multiples of it, except the last
};

// Widths by rank; `layer` is the module's name ("model.layers.0.mlp.up_proj"), or "" where
// DeepSpeed cuts without a name (fused query-key-value). Heads stay whole where the rule applies to
// them.
std::vector<int64_t> split_widths(const RemainderFirst& rule, int64_t total, int ranks,
                                  const std::string& layer);

// torch.chunk's widths; ranks behind the end hold nothing.
std::vector<int64_t> ceil_widths(int64_t total, int ranks);

}  // namespace isoshard
