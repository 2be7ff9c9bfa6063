// See weights_inventory.h. The reader takes the files it finds; what should be there is known from
// the numbers in their names and from the index (transformers' convention).
#include "reshard/weights_inventory.h"

#include <algorithm>
#include <cstdio>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <tuple>

#include "checkpoint/deepspeed/source.h"
#include "checkpoint/shallow_json.h"
#include "core/error.h"

namespace isoshard::reshard {
namespace {

using checkpoint::ShardedState;
using nlohmann::json;

constexpr int64_t kIndexBytes = int64_t{1} << 26;  // of 100,000 tensors it has some 15 MB

constexpr int kMostNamed = 100;  // missing parts of one series; the name alone says how many

// "stem-00002-of-00004.ending", taken apart.
struct PartName {
  bool numbered = false;
  std::string stem, ending;
  int number = 0, count = 0;
};

PartName take_apart(const std::string& name) {
  PartName part;
  const size_t of = name.rfind("-of-");
  if (of == std::string::npos || of < 6 || name[of - 6] != '-' || name.size() < of + 9) return part;
  const std::string digits = name.substr(of - 5, 5) + name.substr(of + 4, 5);
  if (digits.find_first_not_of("0123456789") != std::string::npos) return part;
  return {.numbered = true,
          .stem = name.substr(0, of - 6),
          .ending = name.substr(of + 9),
          .number = std::stoi(digits.substr(0, 5)),
          .count = std::stoi(digits.substr(5))};
}

void check_parts(const ShardedState& state, WeightsInventory* inventory) {
  std::map<std::tuple<std::string, std::string, int>, std::set<int>> series;  // numbers there
  for (const checkpoint::SourceFile& file : state.files) {
    const PartName part = take_apart(file.relative);
    if (part.numbered) series[{part.stem, part.ending, part.count}].insert(part.number);
  }
  for (const auto& [key, numbers] : series) {
    const auto& [stem, ending, count] = key;
    const auto here = std::distance(numbers.lower_bound(1), numbers.upper_bound(count));
    int64_t left = count - here;  // to be named
    for (int number = 1, named = 0; number <= count && named < kMostNamed; ++number) {
      if (numbers.count(number) != 0) continue;
      char middle[32];
      std::snprintf(middle, sizeof middle, "-%05d-of-%05d", number, count);
      inventory->missing.push_back(quote(stem + middle + ending));
      ++named;
      --left;
    }
    if (left > 0) inventory->missing.push_back(std::to_string(left) + " more of these");
  }
}

// Which file holds each name; aliases lie where their targets do.
std::map<std::string, std::string> files_by_tensor(const ShardedState& state) {
  std::map<std::string, std::string> files;
  const auto add = [&](const std::string& name, const checkpoint::Leaf& leaf) {
    const int file = leaf.fragments.empty() ? -1 : leaf.fragments.front().file;
    files[name] = file < 0 ? "" : state.files[static_cast<size_t>(file)].relative;
  };
  for (const checkpoint::ParameterState& parameter : state.parameters)
    add(parameter.name, state.leaf(parameter.weight));
  for (const checkpoint::BufferState& buffer : state.buffers)  // as a certificate names them
    add(buffer.name, state.leaf(buffer.leaf));
  for (const checkpoint::Alias& alias : state.aliases) files.emplace(alias.name, "");
  return files;
}

void check_index(const json& map, const ShardedState& state, WeightsInventory* inventory) {
  std::map<std::string, std::string> files = files_by_tensor(state);
  for (const auto& [name, file] : map.items()) {
    const auto found = files.find(name);
    if (found == files.end()) {
      inventory->missing.push_back("tensor " + quote(name));
    } else if (!found->second.empty() && file != found->second) {
      inventory->odd.push_back("tensor " + quote(name) + " lies in " + quote(found->second));
    }
    if (found != files.end()) files.erase(found);
  }
  for (const auto& [name, file] : files) {
    if (!file.empty()) inventory->odd.push_back("tensor " + quote(name) + " is not in the index");
  }
}

}  // namespace

WeightsInventory take_weights_inventory(Storage& storage, const ShardedState& state) {
  WeightsInventory inventory;
  check_parts(state, &inventory);
  const bool safetensors = !state.files.empty() && !state.files.front().torch;
  const std::string name =
      safetensors ? "model.safetensors.index.json" : "pytorch_model.bin.index.json";
  const std::string path = checkpoint::join(state.folder, name);
  inventory.has_index = storage.is_file(path);
  if (!inventory.has_index) return inventory;
  const checkpoint::ShallowJson read =
      checkpoint::read_shallow_json(read_small_file(storage, path, kIndexBytes));
  const json& index = read.value;
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object()) {
    throw Error(
        ErrorInfo{.code = ErrorCode::kCorrupt,
                  .what = "The index of the weights is no JSON object with a weight_map.",
                  .file = path,
                  .found = read.why,
                  .next = "restore it from another copy; the files can be read without it"});
  }
  check_index(index["weight_map"], state, &inventory);
  return inventory;
}

}  // namespace isoshard::reshard
