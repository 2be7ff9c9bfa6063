// See universal_states.h.
#include "checkpoint/deepspeed/universal_states.h"

#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "checkpoint/deepspeed/fields.h"
#include "checkpoint/deepspeed/hyper.h"
#include "checkpoint/manifest.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

std::set<std::string> states_of(const ShardedState& state, const ParameterState& parameter) {
  std::set<std::string> names;
  for (int leaf : parameter.states) names.insert(state.leaf(leaf).state);
  for (const Scalar& scalar : parameter.scalars) names.insert(scalar.name);
  return names;
}

// By group: the first one with the same settings, whose optimizer keeps the same states.
std::vector<size_t> families_of(const ShardedState& state) {
  const nlohmann::json hyper = optimizer_json(state).value("param_groups", nlohmann::json::array());
  std::map<std::string, size_t> known;
  std::vector<size_t> families;
  for (size_t group = 0; group < state.groups.size(); ++group) {
    nlohmann::json entry = hyper.at(group);
    entry.erase("names");
    families.push_back(known.emplace(entry.dump(), group).first->second);
  }
  return families;
}

void walk(Storage& storage, const std::string& folder, const std::string& name,
          std::vector<std::string>* files) {
  for (const DirectoryEntry& entry : storage.list(folder)) {
    const std::string inner = name.empty() ? entry.name : name + "/" + entry.name;
    if (entry.kind == DirectoryEntry::Kind::kDirectory)
      walk(storage, join(folder, entry.name), inner, files);
    else if (!name.empty() && entry.name.size() > 3 && entry.name.ends_with(".pt"))
      files->push_back("zero/" + inner);
  }
}

// The files that were missing from the start, of a folder that isoshard wrote.
class LeftOut {
 public:
  LeftOut(Storage& storage, std::string folder) : storage_(storage), folder_(std::move(folder)) {}

  bool holds(const std::string& file) {
    if (!read_) listed_ = listed_files(storage_, folder_);
    read_ = true;
    return listed_ && listed_->count(file) == 0;
  }

 private:
  Storage& storage_;
  std::string folder_;
  bool read_ = false;
  std::optional<std::set<std::string>> listed_;
};

// A state is a tensor for all parameters of a family or a number for all: the fewer are wrong.
void refuse_other_kinds(const ShardedState& state, const std::vector<size_t>& families) {
  std::map<std::pair<size_t, std::string>, std::pair<std::vector<int>, std::vector<int>>> files;
  for (const ParameterState& parameter : state.parameters) {
    if (parameter.group < 0) continue;
    const size_t family = families.at(static_cast<size_t>(parameter.group));
    for (int number : parameter.states) {
      const Leaf& leaf = state.leaf(number);
      if (!leaf.fragments.empty())
        files[{family, leaf.state}].first.push_back(leaf.fragments[0].file);
    }
    for (const Scalar& scalar : parameter.scalars)
      files[{family, scalar.name}].second.push_back(scalar.value.file);
  }
  for (const auto& [of, kinds] : files) {
    const auto& [tensors, numbers] = kinds;
    if (tensors.empty() || numbers.empty()) continue;
    const bool number_is_odd = numbers.size() <= tensors.size();
    const int file = number_is_odd ? numbers[0] : tensors[0];
    Fields(state.document(file))
        .fail(
            "A state is a tensor for some parameters with the same settings and a number for "
            "others.",
            quote(of.second), number_is_odd ? "a tensor" : "a number",
            number_is_odd ? "no tensor" : "a tensor");
  }
}

}  // namespace

std::vector<std::string> universal_state_files(Storage& storage, const std::string& folder) {
  std::vector<std::string> files;
  walk(storage, join(folder, "zero"), "", &files);
  return files;
}

std::optional<std::set<std::string>> listed_files(Storage& storage, const std::string& folder) {
  const std::string path = join(folder, kManifestName);
  if (!storage.is_file(path)) return std::nullopt;
  try {
    std::set<std::string> listed;
    const std::string text = read_small_file(storage, path, kLargestManifestBytes);
    for (const ManifestFile& file : parse_manifest(text, path).files) listed.insert(file.path);
    return listed;
  } catch (const Error&) {
    return std::nullopt;
  }
}

std::vector<LackingState> lacking_universal_states(const ShardedState& state, Storage& storage) {
  const std::vector<size_t> families = families_of(state);
  refuse_other_kinds(state, families);
  const auto family_of = [&](const ParameterState& parameter) {
    return families.at(static_cast<size_t>(parameter.group));
  };
  std::map<size_t, std::map<std::string, std::string>> states;  // by family: state, who has it
  for (const ParameterState& parameter : state.parameters) {
    if (parameter.group < 0) continue;
    for (const std::string& name : states_of(state, parameter))
      states[family_of(parameter)].emplace(name, parameter.name);
  }
  LeftOut left_out(storage, state.folder);
  std::vector<LackingState> lacking;
  for (const ParameterState& parameter : state.parameters) {
    if (parameter.group < 0) continue;
    const std::set<std::string> own = states_of(state, parameter);
    for (const auto& [name, owner] : states[family_of(parameter)]) {
      const std::string file = "zero/" + parameter.name + "/" + name + ".pt";
      if (own.count(name) == 0 && !left_out.holds(file)) lacking.push_back({file, owner});
    }
  }
  return lacking;
}

void check_universal_states(ShardedState* state, Storage& storage, const ReadOptions& options) {
  const std::vector<LackingState> lacking = lacking_universal_states(*state, storage);
  if (lacking.empty()) return;
  if (!options.lost_experts)
    state->refuse(ErrorCode::kIncomplete,
                  "A parameter lacks a state that others with its settings have.", lacking[0].file,
                  "as " + quote(lacking[0].owner) + " has", "absent",
                  "copy it from where the folder was written, or convert the source checkpoint "
                  "again");
  const bool several = lacking.size() > 1;
  const std::string more = several ? " and " + std::to_string(lacking.size() - 1) + " others" : "";
  state->notices.push_back(quote(lacking[0].file) + more + (several ? " are" : " is") +
                           " missing: states that others with the same settings have");
}

}  // namespace isoshard::checkpoint
