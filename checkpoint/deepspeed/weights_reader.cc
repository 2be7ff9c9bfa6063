// Weights alone: pytorch_model*.bin or model*.safetensors, sharded or not. What is a buffer and
// what is tied follows from certificate.json beside them when it is ours; otherwise every name
// counts as a weight and aliases are the names that share bytes.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "checkpoint/deepspeed/reader.h"
#include "checkpoint/format/safetensors.h"
#include "checkpoint/shallow_json.h"
#include "core/error.h"
#include "core/utf8.h"

namespace isoshard::checkpoint {
namespace {

bool is_safetensors(const std::string& name) {
  return name.size() > 12 && name.substr(name.size() - 12) == ".safetensors";
}

void add_weight(ShardedState* state, Leaf leaf) {
  if (state->find_parameter(leaf.name) != nullptr) {
    throw Error(ErrorInfo{.code = ErrorCode::kMismatch,
                          .what = "A tensor stands in two files.",
                          .file = state->folder,
                          .entry = quote(leaf.name),
                          .expected = "each tensor once",
                          .next = "remove the file that belongs to another model or save"});
  }
  state->module_order.push_back(leaf.name);
  ParameterState parameter{.name = leaf.name,
                           .shape = leaf.shape,
                           .model_dtype = leaf.dtype,
                           .states = {},
                           .scalars = {}};
  parameter.weight = state->add_leaf(std::move(leaf));
  state->parameters.push_back(std::move(parameter));
}

void read_bin(ShardedState* state, int file,
              std::map<std::pair<int, int64_t>, std::string>* places) {
  const TorchFile& document = state->document(file);
  const Fields fields(document);
  for (const auto& [name, node] : fields.named(fields.root(), "state dict")) {
    const TensorView view = fields.tensor(node, name);
    const int64_t bytes = numel(view.shape);
    const auto [known, fresh] = places->emplace(std::pair(file, document.data_offset(view)), name);
    const ParameterState* other =
        fresh || bytes == 0 ? nullptr : state->find_parameter(known->second);
    if (other != nullptr && other->shape == view.shape) {
      state->module_order.push_back(name);
      state->aliases.push_back({name, known->second, -1});
      continue;
    }
    add_weight(state, file_leaf(document, file, view, name, "param"));
  }
}

void read_tensors(ShardedState* state, int file) {
  const SafetensorsIndex index = read_safetensors(state->files[static_cast<size_t>(file)].bytes());
  for (const SafetensorsEntry& entry : index.entries) {
    std::vector<FileFragment> fragments;
    if (numel(entry.shape) > 0)
      fragments.push_back({0, numel(entry.shape), file, entry.offset_bytes});
    add_weight(state, {.name = entry.name,
                       .state = "param",
                       .dtype = entry.dtype,
                       .shape = entry.shape,
                       .fragments = std::move(fragments)});
  }
  for (const auto& [key, value] : index.metadata) {
    if (key.rfind("alias:", 0) != 0) continue;
    const std::string alias = key.substr(6);
    if (!why_unsafe_name(alias).empty() || state->find_parameter(value) == nullptr ||
        state->find_parameter(alias) != nullptr) {
      throw Error(ErrorInfo{.code = ErrorCode::kCorrupt,
                            .what = "An alias in the metadata names no tensor of the file.",
                            .file = state->files[static_cast<size_t>(file)].path,
                            .entry = quote(key),
                            .expected = "the name of a tensor",
                            .found = quote(value),
                            .next = "convert the source checkpoint again"});
    }
    state->aliases.push_back({alias, value, -1});
  }
}

// Our own certificate says which names are buffers.
void take_buffers(ShardedState* state, const std::string& certificate) {
  const ShallowJson read = read_shallow_json(certificate);
  if (!read.why.empty())
    state->inferred.push_back("what is a buffer: certificate.json cannot be read: " + read.why);
  const nlohmann::json& parsed = read.value;
  if (!parsed.is_object() || !parsed.contains("buffers") || !parsed["buffers"].is_array()) return;
  std::set<std::string> names;
  for (const nlohmann::json& name : parsed["buffers"]) {
    if (name.is_string()) names.insert(name.get<std::string>());
  }
  name_buffers(state, names);
}

// Of model-00001-of-00003.safetensors and its kin all must be there.
void check_parts(const ShardedState& state, const std::vector<std::string>& files) {
  const std::set<std::string> there(files.begin(), files.end());
  std::set<std::string> series;  // that were looked at
  for (const std::string& name : files) {
    const size_t of = name.find("-of-");
    if (of == std::string::npos || of < 5) continue;
    if (!series.insert(name.substr(0, of - 5) + name.substr(of)).second) continue;
    const size_t count = std::strtoul(name.c_str() + of + 4, nullptr, 10);
    std::string missing;
    for (size_t part = 1; part <= count && part <= 100'000 && missing.empty(); ++part) {
      char number[16];
      std::snprintf(number, sizeof number, "%05zu", part);
      const std::string expected = name.substr(0, of - 5) + number + name.substr(of);
      if (!there.contains(expected)) missing = expected;
    }
    if (missing.empty() && count == files.size()) continue;
    throw Error(ErrorInfo{.code = ErrorCode::kIncomplete,
                          .what = "Files of a sharded model are missing, or two models are mixed.",
                          .file = state.folder,
                          .entry = quote(missing.empty() ? name : missing),
                          .expected = std::to_string(count) + " files",
                          .found = std::to_string(files.size()),
                          .next = "bring the missing files, or name one folder a model"});
  }
}

}  // namespace

void name_buffers(ShardedState* state, const std::set<std::string>& names) {
  std::vector<ParameterState> parameters;
  for (ParameterState& parameter : state->parameters) {
    if (names.count(parameter.name) == 0) {
      parameters.push_back(std::move(parameter));
    } else {
      state->buffers.push_back({parameter.name, parameter.weight});
    }
  }
  state->set_parameters(std::move(parameters));
}

void read_weights(ShardedState* state, Storage& storage, const SourcePlace& place) {
  state->flavour = Flavour::kWeights;
  std::map<std::pair<int, int64_t>, std::string> places;
  if (place.folder_named) check_parts(*state, place.files);
  for (const std::string& name : place.files) {
    if (is_safetensors(name)) {
      const std::string path = join(place.folder, name);
      state->files.push_back(
          {path, name, nullptr, std::shared_ptr<ReadableFile>(storage.open_read(path))});
      read_tensors(state, static_cast<int>(state->files.size()) - 1);
    } else {
      read_bin(state,
               open_files(state, storage, {name},
                          ReadOptions{.tag = "", .param_order = "", .allow_renamed = true})[0],
               &places);
    }
  }
  const std::string certificate = join(place.folder, "certificate.json");
  if (storage.is_file(certificate)) {
    take_buffers(state, read_small_file(storage, certificate, 64 << 20));
  } else {
    state->inferred.push_back("what is a buffer: not recorded in this format");
  }
}

}  // namespace isoshard::checkpoint
