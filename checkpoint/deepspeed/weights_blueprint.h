// What zero_to_fp32 makes of a checkpoint (deepspeed/utils/zero_to_fp32.py, 0.19.8), as blueprints:
// buffers, frozen parameters, trained parameters, aliases, in that order, floating values in fp32.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "checkpoint/blueprint.h"
#include "checkpoint/sharded_state.h"

namespace isoshard::checkpoint {

struct WeightsOptions {
  bool safetensors = true;
  int64_t max_shard_bytes = 5'000'000'000;  // 0: one file
  bool exclude_frozen = false;
  bool model_dtype = false;        // every tensor in the model's dtype, and not in fp32
  bool buffers_in_fp32 = false;    // integers and booleans too (DeepSpeed ≤ 0.16.9)
  bool frozen_keep_dtype = false;  // DeepSpeed ≤ 0.16.9
  bool ordered_dict = false;       // DeepSpeed 0.14.5
};

TargetFiles weights_blueprints(const ShardedState& state, const WeightsOptions& options);

// "5GB" → 5,000,000,000; decimal units KB, MB, GB, TB, or plain bytes. Throws Error(kUsage).
int64_t parse_size(const std::string& text);

}  // namespace isoshard::checkpoint
