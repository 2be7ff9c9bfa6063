// What a ds_config in a model file says by words (runtime/config.py, runtime/constants.py).
#pragma once

#include <string>

#include "checkpoint/deepspeed/fields.h"

namespace isoshard::checkpoint {

// config[section][key] as text of a string or "True"/"False"; empty if absent.
std::string config_text(const Fields& fields, NodeId config, const char* section, const char* key);

bool is_bf16(const Fields& model, NodeId config);

// offload_optimizer.device is cpu (engine.py, zero_cpu_offload).
bool offloads_to_cpu(const Fields& model, NodeId config);

// A dtype as a config may spell float32 (DtypeEnum).
bool means_fp32(const std::string& dtype);

}  // namespace isoshard::checkpoint
