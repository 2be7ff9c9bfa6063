// See pickled.h.
#include "engine/pickled.h"

#include <algorithm>
#include <cstdint>

#include "checkpoint/deepspeed/patterns.h"
#include "checkpoint/deepspeed/reshard_target.h"
#include "core/affine_map.h"
#include "core/cast.h"
#include "core/error.h"

namespace isoshard::engine {

using checkpoint::NodeId;
using checkpoint::TorchBuilder;

NodeId json_node(TorchBuilder* builder, const nlohmann::ordered_json& json) {
  checkpoint::Pickle& pickle = builder->pickle;
  switch (json.type()) {
    case nlohmann::ordered_json::value_t::null:
      return pickle.none();
    case nlohmann::ordered_json::value_t::boolean:
      return pickle.boolean(json.get<bool>());
    case nlohmann::ordered_json::value_t::number_integer:
    case nlohmann::ordered_json::value_t::number_unsigned:
      if (json.is_number_unsigned() && json.get<uint64_t>() > uint64_t{INT64_MAX}) {
        throw Error(ErrorCode::kUsage,
                    "A number of the config or of client_state is larger than 2^63 − 1.");
      }
      return pickle.integer(json.get<int64_t>());
    case nlohmann::ordered_json::value_t::number_float:
      return pickle.real(json.get<double>());
    case nlohmann::ordered_json::value_t::string:
      return pickle.string(json.get<std::string>());
    case nlohmann::ordered_json::value_t::array: {
      std::vector<NodeId> items;
      for (const auto& item : json) items.push_back(json_node(builder, item));
      return pickle.list(std::move(items));
    }
    case nlohmann::ordered_json::value_t::object: {
      std::vector<std::pair<std::string, NodeId>> entries;
      for (const auto& [key, value] : json.items()) {
        entries.emplace_back(key, json_node(builder, value));
      }
      return builder->dict(std::move(entries));
    }
    default:
      break;
  }
  throw Error(ErrorCode::kUsage, "A value of the config or of client_state has no pickled form.");
}

NodeId setting_node(TorchBuilder* builder, const Setting& setting) {
  checkpoint::Pickle& pickle = builder->pickle;
  if (const bool* truth = std::get_if<bool>(&setting)) return pickle.boolean(*truth);
  if (const int64_t* whole = std::get_if<int64_t>(&setting)) return pickle.integer(*whole);
  if (const double* number = std::get_if<double>(&setting)) return pickle.real(*number);
  if (const auto* text = std::get_if<std::string>(&setting)) return pickle.string(*text);
  if (const auto* numbers = std::get_if<std::vector<double>>(&setting)) {
    std::vector<NodeId> items;
    for (const double number : *numbers) items.push_back(pickle.real(number));
    return pickle.tuple(std::move(items));
  }
  return pickle.none();
}

int value_storage(TorchBuilder* builder, std::span<const float> values, DType dtype) {
  checkpoint::StorageFill fill{.dtype = dtype,
                               .numel = static_cast<int64_t>(values.size()),
                               .runs = {},
                               .copy = {},
                               .literal = {}};
  fill.literal.resize(values.size() * static_cast<size_t>(item_size_bytes(dtype)));
  cast(DType::kFloat32, std::as_bytes(values), dtype,
       std::as_writable_bytes(std::span(fill.literal)));
  return builder->add_storage(std::move(fill));
}

std::vector<std::pair<std::string, NodeId>> split_info(TorchBuilder* builder,
                                                       const TrainingState& state, int ranks) {
  checkpoint::Pickle& pickle = builder->pickle;
  std::vector<std::string> rows, replicas, vocabulary;
  std::vector<std::pair<std::string, NodeId>> maps, replica_maps;  // as DeepSpeed has them
  int64_t words = 0;
  for (const TrainedParameter& p : state.parameters) {
    const std::string pattern = checkpoint::exact_pattern(p.name);
    if (p.split_widths.empty())
      replicas.push_back(pattern);
    else if (p.split_axis == 1)
      rows.push_back(pattern);
    else if (p.name == "lm_head.weight")
      vocabulary.push_back(pattern);
    if (p.name == "lm_head.weight") words = p.whole[0];
    const AffineMap map =
        p.split_widths.empty()
            ? replicated_map(p.expert ? p.shape : p.whole, ranks)
            : split_map(p.whole, static_cast<size_t>(p.split_axis), {p.split_widths});
    auto& list = p.split_widths.empty() ? replica_maps : maps;
    list.emplace_back(pattern, checkpoint::map_node(builder, map));
  }
  maps.insert(maps.end(), replica_maps.begin(), replica_maps.end());
  const auto sorted = [&](std::vector<std::string> patterns) {
    std::sort(patterns.begin(), patterns.end());
    std::vector<NodeId> items;
    for (const std::string& pattern : patterns) items.push_back(pickle.string(pattern));
    return pickle.list(std::move(items));
  };
  std::vector<std::pair<std::string, NodeId>> entries = {
      {"universal_checkpoint_version", pickle.real(0.4)},
      {"parameter_with_row_parallelism_patterns", sorted(rows)},
      {"tp_replicated_parameter_patterns", sorted(replicas)},
      {"vocabulary_parameter_patterns", sorted(vocabulary)},
      {"parameter_with_sub_params", pickle.list({})},
      {"autotp_unsupported_parameter_patterns", builder->dict({})}};
  if (words > 0) entries.emplace_back("original_vocab_size", pickle.integer(words));
  entries.emplace_back("affine_map", builder->dict({{"version", pickle.integer(1)},
                                                    {"params", builder->dict(std::move(maps))}}));
  return entries;
}

}  // namespace isoshard::engine
