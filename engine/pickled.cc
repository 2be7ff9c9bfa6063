// See pickled.h.
#include "engine/pickled.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "core/cast.h"
#include "core/check.h"
#include "core/error.h"

namespace isoshard::engine {
namespace {

using checkpoint::NodeId;
using checkpoint::TorchBuilder;

NodeId integers(TorchBuilder* builder, const std::vector<int64_t>& values) {
  std::vector<NodeId> items;
  for (const int64_t value : values) items.push_back(builder->pickle.integer(value));
  return builder->pickle.list(std::move(items));
}

// Python's re.escape between ^ and $, of a parameter's name.
std::string exact_pattern(const std::string& name) {
  std::string text = "^";
  for (const char c : name) {
    const bool plain = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                       c == '_' || static_cast<unsigned char>(c) >= 0x80;
    if (!plain) text += '\\';
    text += c;
  }
  return text + "$";
}

// Products of the sizes behind, as DeepSpeed counts them: 0 behind an empty axis, not 1 as torch.
Shape plain_stride(const Shape& shape) {
  Shape stride(shape.size(), 1);
  for (size_t axis = shape.size(); axis-- > 1;) stride[axis - 1] = stride[axis] * shape[axis];
  return stride;
}

// One piece: where a rank's shard lies in the whole.
NodeId rank_map(TorchBuilder* builder, const TrainedParameter& p, int rank, int ranks) {
  Shape shard = p.whole;
  int64_t begin = 0;
  std::vector<int64_t> holders;
  if (p.split_widths.empty()) {
    for (int other = 0; other < ranks; ++other) holders.push_back(other);
  } else {
    const size_t axis = static_cast<size_t>(p.split_axis);
    shard[axis] = p.split_widths[static_cast<size_t>(rank)];
    for (int other = 0; other < rank; ++other) begin += p.split_widths[static_cast<size_t>(other)];
    begin *= plain_stride(p.whole)[axis];
    holders = {rank};
  }
  const auto address = [&](int64_t offset, const Shape& of) {
    return builder->pickle.list(
        {builder->pickle.integer(offset), integers(builder, plain_stride(of))});
  };
  const NodeId piece = builder->dict({{"shape", integers(builder, shard)},
                                      {"source", address(begin, p.whole)},
                                      {"dest", address(0, shard)},
                                      {"locations", integers(builder, holders)}});
  return builder->dict(
      {{"shard_shape", integers(builder, shard)}, {"pieces", builder->pickle.list({piece})}});
}

}  // namespace

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
  for (size_t i = 0; i < values.size(); ++i) {
    if (dtype == DType::kFloat32) {
      std::memcpy(fill.literal.data() + 4 * i, &values[i], 4);
      continue;
    }
    CHECK(dtype == DType::kBFloat16 || dtype == DType::kFloat16, "not a dtype of parameters");
    const uint16_t bits =
        dtype == DType::kBFloat16 ? bfloat16_from_float(values[i]) : half_from_float(values[i]);
    std::memcpy(fill.literal.data() + 2 * i, &bits, 2);
  }
  return builder->add_storage(std::move(fill));
}

NodeId split_info_node(TorchBuilder* builder, const TrainingState& state, int ranks) {
  checkpoint::Pickle& pickle = builder->pickle;
  std::vector<std::string> rows, replicas, vocabulary;
  std::vector<std::pair<std::string, NodeId>> maps, replica_maps;  // as DeepSpeed has them
  int64_t words = 0;
  for (const TrainedParameter& p : state.parameters) {
    const std::string pattern = exact_pattern(p.name);
    if (p.split_widths.empty())
      replicas.push_back(pattern);
    else if (p.split_axis == 1)
      rows.push_back(pattern);
    else if (p.name == "lm_head.weight")
      vocabulary.push_back(pattern);
    if (p.name == "lm_head.weight") words = p.whole[0];
    std::vector<NodeId> by_rank;
    for (int rank = 0; rank < ranks; ++rank) {
      by_rank.push_back(pickle.integer(rank));
      by_rank.push_back(rank_map(builder, p, rank, ranks));
    }
    auto& list = p.split_widths.empty() ? replica_maps : maps;
    list.emplace_back(pattern, builder->dict({{"logical_shape", integers(builder, p.whole)},
                                              {"ranks", pickle.dict(std::move(by_rank))}}));
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
  return builder->dict(std::move(entries));
}

}  // namespace isoshard::engine
