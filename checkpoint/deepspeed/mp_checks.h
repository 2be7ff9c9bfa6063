// What the files of all mp ranks must say alike.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "checkpoint/deepspeed/merge.h"

namespace isoshard::checkpoint {

// Hyper-parameters, scheduler, scaler, counters of an mp rank.
nlohmann::json shared_hyper(const ShardedState& part);

// Throws Error(kMismatch): the first of them that is not as expected.
[[noreturn]] void refuse_hyper(const MpPart& part, const nlohmann::json& expected,
                               const nlohmann::json& found);

// Every mp rank's universal_checkpoint_info says what rank 0's says of tensor-parallel splits, or
// Error(kMismatch); DeepSpeed believes rank 0's. Without one a rank says nothing.
void check_split_info(const ShardedState& whole, const std::vector<MpPart>& parts);

}  // namespace isoshard::checkpoint
