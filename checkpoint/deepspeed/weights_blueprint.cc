// See weights_blueprint.h; the sharding rule is huggingface_hub's (split_state_dict_into_shards).
#include "checkpoint/deepspeed/weights_blueprint.h"

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>

#include "checkpoint/format/safetensors.h"
#include "checkpoint/torch_builder.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

struct Entry {
  std::string name;
  int leaf = -1;
  DType dtype = DType::kFloat32;
  bool requires_grad = false;
  std::string alias_of;  // another entry's name, or empty
  int64_t bytes = 0;
};

DType output_dtype(DType dtype, bool integers_too) {
  return is_floating(dtype) || integers_too ? DType::kFloat32 : dtype;
}

// What a tensor that lies there as `stored`, and in the model as `model`, is written as.
DType entry_dtype(DType stored, DType model, bool integers_too, const WeightsOptions& options) {
  return options.model_dtype ? model : output_dtype(stored, integers_too);
}

std::vector<Entry> entries_of(const ShardedState& state, const WeightsOptions& options) {
  std::vector<Entry> result;
  const auto add = [&](const std::string& name, int leaf, DType dtype, bool grad) {
    const int64_t bytes = state.leaf(leaf).size_elements() * item_size_bytes(dtype);
    result.push_back({name, leaf, dtype, grad, "", bytes});
  };
  for (const BufferState& buffer : state.buffers) {
    const DType stored = state.leaf(buffer.leaf).dtype;
    add(buffer.name, buffer.leaf, entry_dtype(stored, stored, options.buffers_in_fp32, options),
        false);
  }
  for (const ParameterState& parameter : state.parameters) {
    if (parameter.group >= 0 || options.exclude_frozen) continue;
    const DType stored = state.leaf(parameter.weight).dtype;
    add(parameter.name, parameter.weight,
        options.frozen_keep_dtype ? stored
                                  : entry_dtype(stored, parameter.model_dtype, false, options),
        false);
  }
  for (const GroupState& group : state.groups) {
    for (int number : group.flat_order) {
      const ParameterState& parameter = state.parameters[static_cast<size_t>(number)];
      add(parameter.name, parameter.weight,
          entry_dtype(state.leaf(parameter.weight).dtype, parameter.model_dtype, false, options),
          true);
    }
  }
  for (const Alias& alias : state.aliases) {
    const auto target = std::find_if(result.begin(), result.end(),
                                     [&](const Entry& e) { return e.name == alias.target; });
    if (target == result.end()) continue;  // its parameter is excluded
    Entry entry = *target;
    entry.name = alias.name;
    entry.alias_of = alias.target;
    result.push_back(std::move(entry));
  }
  return result;
}

std::vector<std::vector<Entry>> split(const std::vector<Entry>& entries, int64_t limit) {
  std::vector<std::vector<Entry>> shards;
  std::vector<Entry> current;
  int64_t bytes = 0;
  for (const Entry& entry : entries) {
    if (!entry.alias_of.empty()) continue;
    if (limit > 0 && entry.bytes > limit) {
      shards.push_back({entry});
      continue;
    }
    if (limit > 0 && bytes + entry.bytes > limit) {
      if (!current.empty()) shards.push_back(std::move(current));
      current.clear();
      bytes = 0;
    }
    current.push_back(entry);
    bytes += entry.bytes;
  }
  if (!current.empty() || shards.empty()) shards.push_back(std::move(current));
  for (const Entry& entry : entries) {
    if (entry.alias_of.empty()) continue;
    for (std::vector<Entry>& shard : shards) {
      const bool here = std::any_of(shard.begin(), shard.end(),
                                    [&](const Entry& e) { return e.name == entry.alias_of; });
      if (here) shard.push_back(entry);
    }
  }
  return shards;
}

StorageFill fill_of(const ShardedState& state, const Entry& entry) {
  return whole_fill(entry.leaf, state.leaf(entry.leaf).size_elements(), entry.dtype);
}

FileBlueprint bin_file(const ShardedState& state, const std::string& path,
                       const std::vector<Entry>& entries, bool ordered) {
  TorchBuilder builder;
  std::map<std::string, int> storages;
  std::vector<NodeId> items;
  for (const Entry& entry : entries) {
    const std::string& holder = entry.alias_of.empty() ? entry.name : entry.alias_of;
    if (storages.count(holder) == 0) storages[holder] = builder.add_storage(fill_of(state, entry));
    items.push_back(builder.pickle.string(entry.name));
    items.push_back(builder.tensor({.shape = state.leaf(entry.leaf).shape,
                                    .storage = storages[holder],
                                    .requires_grad = entry.requires_grad}));
  }
  return builder.finish(path, ordered ? builder.pickle.ordered_dict(std::move(items))
                                      : builder.pickle.dict(std::move(items)));
}

// Order of the safetensors library: larger alignment first, then by name.
int dtype_rank(DType dtype) {
  constexpr DType kOrder[] = {
      DType::kBool,         DType::kUInt8,   DType::kInt8,   DType::kFloat8E5M2,
      DType::kFloat8E4M3FN, DType::kInt16,   DType::kUInt16, DType::kFloat16,
      DType::kBFloat16,     DType::kInt32,   DType::kUInt32, DType::kFloat32,
      DType::kComplex64,    DType::kFloat64, DType::kInt64,  DType::kUInt64};
  return static_cast<int>(std::find(std::begin(kOrder), std::end(kOrder), dtype) -
                          std::begin(kOrder));
}

FileBlueprint safetensors_file(const ShardedState& state, const std::string& path,
                               const std::vector<Entry>& entries) {
  std::vector<Entry> sorted;
  SafetensorsIndex index;
  for (const Entry& entry : entries) {
    if (entry.alias_of.empty())
      sorted.push_back(entry);
    else
      index.metadata.emplace_back("alias:" + entry.name, entry.alias_of);
  }
  index.metadata.emplace_back("format", "pt");
  std::sort(sorted.begin(), sorted.end(), [](const Entry& a, const Entry& b) {
    return std::pair(-dtype_rank(a.dtype), a.name) < std::pair(-dtype_rank(b.dtype), b.name);
  });
  FileBlueprint file{
      .path = path, .kind = FileBlueprint::Kind::kSafetensors, .head = {}, .storages = {}};
  for (const Entry& entry : sorted) {
    index.entries.push_back(
        {.name = entry.name, .dtype = entry.dtype, .shape = state.leaf(entry.leaf).shape});
    file.storages.push_back(fill_of(state, entry));
  }
  file.head = safetensors_head(index);
  return file;
}

std::string shard_name(const std::string& stem, const std::string& extension, size_t number,
                       size_t count) {
  if (count == 1) return stem + extension;
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "-%05zu-of-%05zu", number, count);
  return stem + buffer + extension;
}

}  // namespace

TargetFiles weights_blueprints(const ShardedState& state, const WeightsOptions& options) {
  const std::vector<std::vector<Entry>> shards =
      split(entries_of(state, options), options.max_shard_bytes);
  const std::string stem = options.safetensors ? "model" : "pytorch_model";
  const std::string extension = options.safetensors ? ".safetensors" : ".bin";
  TargetFiles result;
  std::vector<FileBlueprint>& files = result.files;
  for (const ParameterState& parameter : state.parameters) {
    if (parameter.group < 0 && options.exclude_frozen)
      result.skipped.push_back(quote(parameter.name) + ": frozen, and excluded");
  }
  nlohmann::json map = nlohmann::json::object();
  int64_t total = 0;
  for (size_t i = 0; i < shards.size(); ++i) {
    const std::string path = shard_name(stem, extension, i + 1, shards.size());
    files.push_back(options.safetensors ? safetensors_file(state, path, shards[i])
                                        : bin_file(state, path, shards[i], options.ordered_dict));
    for (const Entry& entry : shards[i]) {
      if (entry.alias_of.empty() || !options.safetensors) map[entry.name] = path;
      if (entry.alias_of.empty()) total += entry.bytes;
    }
  }
  if (shards.size() > 1) {
    const nlohmann::json index = {{"metadata", {{"total_size", total}}}, {"weight_map", map}};
    files.push_back({.path = stem + extension + ".index.json",
                     .kind = FileBlueprint::Kind::kText,
                     .head = index.dump(2) + "\n",
                     .storages = {}});
  }
  return result;
}

int64_t parse_size(const std::string& text) {
  int64_t value = 0;
  const auto [stop, failure] = std::from_chars(text.data(), text.data() + text.size(), value);
  std::string unit(stop, text.data() + text.size());
  std::transform(unit.begin(), unit.end(), unit.begin(),
                 [](unsigned char c) { return static_cast<char>(std::toupper(c)); });
  const std::map<std::string, int64_t> units = {
      {"", 1}, {"KB", 1'000}, {"MB", 1'000'000}, {"GB", 1'000'000'000}, {"TB", 1'000'000'000'000}};
  const auto found = units.find(unit);
  if (failure != std::errc() || found == units.end() || value <= 0 ||
      value > (1ll << 62) / found->second) {
    throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                          .what = "A size cannot be read.",
                          .expected = "a number with KB, MB, GB or TB, such as 5GB",
                          .found = quote(text)});
  }
  return value * found->second;
}

}  // namespace isoshard::checkpoint
