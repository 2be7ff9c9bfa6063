// See config_text.h.
#include "checkpoint/deepspeed/config_text.h"

namespace isoshard::checkpoint {

std::string config_text(const Fields& fields, NodeId config, const char* section, const char* key) {
  if (config == kNoNode) return "";
  const NodeId inner = fields.maybe(config, section);
  if (inner == kNoNode || !fields.pickle().is_mapping(inner)) return "";
  const NodeId value = fields.maybe(inner, key);
  if (value == kNoNode) return "";
  if (fields.pickle().kind(value) == Kind::kString) return fields.pickle().text(value);
  if (fields.pickle().kind(value) == Kind::kBool)
    return fields.pickle().integer_value(value) ? "True" : "False";
  return "";
}

bool is_bf16(const Fields& model, NodeId config) {
  return config_text(model, config, "bf16", "enabled") == "True" ||
         config_text(model, config, "bfloat16", "enabled") == "True";
}

bool offloads_to_cpu(const Fields& model, NodeId config) {
  if (config == kNoNode) return false;
  const NodeId zero = model.maybe(config, "zero_optimization");
  if (zero == kNoNode || !model.pickle().is_mapping(zero)) return false;
  return config_text(model, zero, "offload_optimizer", "device") == "cpu";
}

bool means_fp32(const std::string& dtype) {
  return dtype == "fp32" || dtype == "float32" || dtype == "float" || dtype == "torch.float32";
}

}  // namespace isoshard::checkpoint
