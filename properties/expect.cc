// See expect.h.
#include "properties/expect.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <set>

#include "checkpoint/deepspeed/reader.h"
#include "core/cast.h"
#include "core/error.h"

namespace isoshard::properties {
namespace {

using checkpoint::Leaf;
using checkpoint::ParameterState;
using checkpoint::ShardedState;

std::string hex(const std::string& bytes, size_t at, size_t count) {
  std::string text = "0x";
  for (size_t i = count; i-- > 0;) {
    char digits[3];
    std::snprintf(digits, sizeof digits, "%02x", static_cast<unsigned char>(bytes[at + i]));
    text += digits;
  }
  return text;
}

std::string first_difference(const std::string& what, const std::string& expected,
                             const std::string& actual, size_t item) {
  if (expected == actual) return "";
  if (expected.size() != actual.size()) {
    return what + ": expected " + std::to_string(expected.size()) + " bytes, found " +
           std::to_string(actual.size());
  }
  const auto at = std::mismatch(expected.begin(), expected.end(), actual.begin()).first;
  const size_t index = static_cast<size_t>(at - expected.begin()) / item;
  return what + " element " + std::to_string(index) + ": expected " +
         hex(expected, index * item, item) + ", found " + hex(actual, index * item, item);
}

std::string as_float32(const std::string& bytes, DType dtype) {
  std::string wide(bytes.size() / static_cast<size_t>(item_size_bytes(dtype)) * 4, '\0');
  cast(dtype, std::as_bytes(std::span(bytes)), DType::kFloat32,
       std::as_writable_bytes(std::span(wide)));
  return wide;
}

class StateJudge {
 public:
  StateJudge(const ShardedState& state, const Model& model) : state_(state), model_(model) {}

  std::string run() {
    std::vector<std::string> reasons = {parameters(), groups(), buffers(), aliases(), copies()};
    for (const std::string& reason : reasons) {
      if (!reason.empty()) return reason;
    }
    return "";
  }

 private:
  std::string leaf(int number, const std::string& expected) {
    const Leaf& found = state_.leaf(number);
    std::string owner;
    if (!found.fragments.empty()) {
      owner = " in " + state_.files[static_cast<size_t>(found.fragments[0].file)].relative;
    }
    return first_difference(quote(found.name) + " " + found.state + owner, expected,
                            leaf_bytes(state_, number),
                            static_cast<size_t>(item_size_bytes(found.dtype)));
  }

  std::string parameters() {
    if (state_.parameters.size() != model_.parameters.size()) return "another number of parameters";
    const std::vector<std::vector<int>> groups = optimizer_groups(model_);
    for (size_t g = 0; g < groups.size(); ++g) {
      for (int number : groups[g]) group_of_[number] = static_cast<int>(g);
    }
    for (size_t i = 0; i < model_.parameters.size(); ++i) {
      const ParameterState* found = state_.find_parameter(model_.parameters[i].name);
      if (found == nullptr) return quote(model_.parameters[i].name) + " is missing";
      if (found->shape != model_.parameters[i].shape) return quote(found->name) + ": another shape";
      if (found->model_dtype != model_.dtype) return quote(found->name) + ": another module dtype";
      const std::string reason = model_.owned(i) ? owned(*found, i) : frozen(*found, i);
      if (!reason.empty()) return reason;
    }
    return "";
  }

  std::string frozen(const ParameterState& found, size_t number) {
    if (found.group != -1) return quote(found.name) + " is not frozen any more";
    if (state_.leaf(found.weight).dtype != model_.dtype)
      return quote(found.name) + ": another dtype";
    return leaf(found.weight, module_bytes(model_, number));
  }

  std::string owned(const ParameterState& found, size_t number) {
    const int parameter = static_cast<int>(number);
    if (found.group != group_of_.at(parameter)) return quote(found.name) + ": another group";
    std::string reason =
        leaf(found.weight, pack(state_bits(model_, parameter, -1), DType::kFloat32));
    if (found.model_copy >= 0 && reason.empty()) {
      reason = leaf(found.model_copy, module_bytes(model_, number));
    }
    std::set<std::string> names;
    for (int state : found.states) names.insert(state_.leaf(state).state);
    if (names.size() != model_.states.size()) {
      return quote(found.name) + ": " + std::to_string(names.size()) + " states";
    }
    for (size_t s = 0; s < model_.states.size() && reason.empty(); ++s) {
      reason = quote(found.name) + " lacks " + model_.states[s].name;
      for (int state : found.states) {
        if (state_.leaf(state).state != model_.states[s].name) continue;
        reason = state_.leaf(state).dtype != model_.states[s].dtype
                     ? quote(found.name) + " " + model_.states[s].name + ": another dtype"
                     : leaf(state, pack(state_bits(model_, parameter, static_cast<int>(s)),
                                        model_.states[s].dtype));
      }
    }
    return reason.empty() ? scalars(found) : reason;
  }

  std::string scalars(const ParameterState& found) {
    std::map<std::string, std::string> expected, actual;
    for (const ScalarKind& scalar : model_.scalars) {
      // All groups of experts have one value: where they are split depends on the degree.
      const int group = model_.experts.empty() ? found.group : std::min(found.group, 1);
      const std::string value = scalar_value_text(scalar, group);
      if (value != "None") expected[scalar.name] = value;
    }
    for (const checkpoint::Scalar& scalar : found.scalars) {
      const std::string value = checkpoint::scalar_text(state_, scalar.value);
      if (value != "None") actual[scalar.name] = value;
    }
    return expected == actual ? "" : quote(found.name) + ": other scalars";
  }

  std::string groups() {
    const std::vector<std::vector<int>> expected = optimizer_groups(model_);
    if (state_.groups.size() != expected.size()) return "another number of groups";
    for (size_t g = 0; g < expected.size(); ++g) {
      std::string wanted, found;
      for (int number : expected[g]) {
        wanted += quote(model_.parameters[static_cast<size_t>(number)].name) + " ";
      }
      for (int number : state_.groups[g].parameters) {
        found += quote(state_.parameters[static_cast<size_t>(number)].name) + " ";
      }
      if (wanted != found) {
        return "group " + std::to_string(g) + ": expected " + wanted + ", found " + found;
      }
    }
    return "";
  }

  std::string buffers() {
    const size_t expected = std::min(model_.buffers.size(), model_.parameters.size());
    if (state_.buffers.size() != expected) return "another number of buffers";
    for (size_t i = 0; i < expected; ++i) {
      for (const checkpoint::BufferState& buffer : state_.buffers) {
        if (buffer.name != model_.buffers[i].name) continue;
        const Leaf& found = state_.leaf(buffer.leaf);
        if (found.dtype != model_.buffers[i].dtype || found.shape != model_.buffers[i].shape) {
          return "buffer " + quote(buffer.name) + ": another dtype or shape";
        }
        const std::string reason = leaf(buffer.leaf, buffer_bytes(model_, i));
        if (!reason.empty()) return reason;
      }
    }
    return "";
  }

  std::string aliases() {
    std::map<std::string, std::string> expected, actual;
    for (const ModelParameter& parameter : model_.parameters) {
      if (!parameter.alias.empty()) expected[parameter.alias] = parameter.name;
    }
    for (const checkpoint::Alias& alias : state_.aliases) actual[alias.name] = alias.target;
    return expected == actual ? "" : "other aliases";
  }

  std::string copies() {
    for (const auto& [original, copy] : state_.copies) {
      const Leaf& source = state_.leaf(original);
      if (!can_cast(source.dtype, state_.leaf(copy).dtype)) continue;
      const std::string reason = leaf(copy, as_float32(leaf_bytes(state_, original), source.dtype));
      if (!reason.empty()) return "copy of " + reason;
    }
    return "";
  }

  const ShardedState& state_;
  const Model& model_;
  std::map<int, int> group_of_;
};

}  // namespace

std::string leaf_bytes(const ShardedState& state, int number) {
  const Leaf& leaf = state.leaf(number);
  const int64_t item = item_size_bytes(leaf.dtype);
  std::string bytes(static_cast<size_t>(leaf.size_bytes()), '\0');
  for (const checkpoint::FileFragment& f : leaf.fragments) {
    state.files[static_cast<size_t>(f.file)].bytes().read_at(
        f.offset_bytes,
        std::as_writable_bytes(std::span(bytes).subspan(static_cast<size_t>(f.begin * item),
                                                        static_cast<size_t>(f.count * item))));
  }
  return bytes;
}

std::string state_difference(const ShardedState& state, const Model& model) {
  return StateJudge(state, model).run();
}

std::string weights_difference(const ShardedState& state, const Model& model) {
  std::map<std::string, std::string> expected;
  for (size_t i = 0; i < model.parameters.size(); ++i) {
    const std::string masters = pack(state_bits(model, static_cast<int>(i), -1), DType::kFloat32);
    const std::string module = as_float32(module_bytes(model, i), model.dtype);
    expected[model.parameters[i].name] = model.owned(i) ? masters : module;
    if (i >= model.buffers.size()) continue;
    const ModelBuffer& buffer = model.buffers[i];
    const std::string bytes = buffer_bytes(model, i);
    expected[buffer.name] = is_floating(buffer.dtype) ? as_float32(bytes, buffer.dtype) : bytes;
  }
  std::map<std::string, std::string> aliases;
  for (const ModelParameter& parameter : model.parameters) {
    if (!parameter.alias.empty()) aliases[parameter.alias] = parameter.name;
  }
  for (const checkpoint::Alias& alias : state.aliases) {
    const auto known = aliases.find(alias.name);
    const bool right = known != aliases.end() && known->second == alias.target;
    if (!right) return "alias " + quote(alias.name) + " is not one of the model";
    aliases.erase(known);
  }
  for (const ParameterState& found : state.parameters) {
    const auto alias = aliases.find(found.name);  // stored apart: it has no elements
    const auto wanted = expected.find(alias == aliases.end() ? found.name : alias->second);
    if (wanted == expected.end()) return quote(found.name) + " is no tensor of the model";
    const std::string reason =
        first_difference(quote(found.name), wanted->second, leaf_bytes(state, found.weight),
                         static_cast<size_t>(item_size_bytes(state.leaf(found.weight).dtype)));
    if (!reason.empty()) return reason;
    if (alias != aliases.end())
      aliases.erase(alias);
    else
      expected.erase(wanted);
  }
  for (const auto& [name, bytes] : expected) return quote(name) + " is missing";
  for (const auto& [name, target] : aliases) return "alias " + quote(name) + " is missing";
  return "";
}

std::string poison_difference(const ShardedState& state) {
  for (const checkpoint::SourceFile& file : state.files) {
    if (!file.torch) continue;
    for (size_t s = 0; s < file.torch->storages().size(); ++s) {
      const DType dtype = file.torch->storages()[s].dtype;
      const bool checked =
          dtype == DType::kFloat32 || dtype == DType::kBFloat16 || dtype == DType::kFloat16;
      if (!checked) continue;
      const checkpoint::ZipRecord& record = file.torch->record(static_cast<int>(s));
      std::string bytes(static_cast<size_t>(record.size_bytes), '\0');
      file.torch->file().read_at(record.data_offset, std::as_writable_bytes(std::span(bytes)));
      const std::string pattern = pack({poison(dtype)}, dtype);
      for (size_t at = 0; at + pattern.size() <= bytes.size(); at += pattern.size()) {
        if (bytes.compare(at, pattern.size(), pattern) != 0) continue;
        return file.relative + " " + record.name + ": padding at element " +
               std::to_string(at / pattern.size());
      }
    }
  }
  return "";
}

std::string folder_difference(Storage& storage, const std::string& expected,
                              const std::string& actual) {
  std::map<std::string, std::string> files[2];
  for (int i = 0; i < 2; ++i) {
    const std::string& folder = i == 0 ? expected : actual;
    for (const DirectoryEntry& entry : storage.list(folder)) {
      files[i][entry.name] = read_small_file(storage, folder + "/" + entry.name, 1 << 28);
    }
  }
  for (const auto& [name, bytes] : files[0]) {
    if (files[1].count(name) == 0) return quote(name) + " is missing";
    const std::string reason = first_difference(name, bytes, files[1].at(name), 1);
    if (!reason.empty()) return reason;
  }
  return files[0].size() == files[1].size() ? "" : "there are more files than expected";
}

}  // namespace isoshard::properties
