// What is neither tensor nor step: param groups, schedule, loss scaler, counters, client state; as
// canonical JSON, so that two checkpoints of any stage and form can be compared.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "checkpoint/sharded_state.h"

namespace isoshard::checkpoint {

// {"client_state", "counters", "loss_scaler", "lr_scheduler", "param_groups"}; empty object if the
// form holds none of it. Keys sorted; floats as hexadecimal text {"float": "0x1p+0"}, tuples and
// objects tagged, so that int, float, list and tuple stay apart. Tensors stand as dtype, shape and
// CRC-64. Throws Error(kLimit), naming file and key, beyond 400,000 values or 32 MiB of text:
// shared objects count each time, so that a graph of a few bytes cannot fill the memory.
nlohmann::json hyper_json(const ShardedState& state);

// {"loss_scaler", "param_groups"} of it: what the optimizer's own file says.
nlohmann::json optimizer_json(const ShardedState& state);

// Keys of a model-state file that DeepSpeed itself writes; all others are client state.
bool is_engine_key(const std::string& key);

// The client state of one model file, in that form.
nlohmann::json client_state_json(const TorchFile& document);

}  // namespace isoshard::checkpoint
