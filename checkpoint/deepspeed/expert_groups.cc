// See expert_groups.h.
#include "checkpoint/deepspeed/expert_groups.h"

#include <algorithm>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>

#include "checkpoint/deepspeed/experts.h"
#include "checkpoint/deepspeed/hyper.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();

// Consecutive groups that were one before they were split.
struct Family {
  size_t first = 0, count = 0;
  bool marked = false;       // moe: True, so that a digest takes its groups for one
  std::vector<int> members;  // in the order of a run with one expert-parallel rank
};

class Regrouping {
 public:
  // `check`: the source's own groups must be those of its degree.
  Regrouping(const ShardedState& state, int ranks, int64_t most, bool check)
      : state_(state), ranks_(ranks), most_(most), check_(check) {
    find_families();
    find_degrees();
  }

  // Whether every layer's experts lie in equal numbers on so many ranks.
  bool shared_evenly(int ranks) const {
    return std::ranges::all_of(families_, [&](const Family& family) {
      return std::ranges::all_of(family.members,
                                 [&](int number) { return experts_of(number) % ranks == 0; });
    });
  }

  std::optional<ShardedState> run(std::vector<std::string>* inferred) {
    std::vector<GroupState> groups;
    bool changed = false;
    size_t next = 0;  // family
    for (size_t g = 0; g < state_.groups.size();) {
      if (next < families_.size() && families_[next].first == g) {
        const Family& family = families_[next++];
        const std::optional<int64_t> limit = limit_of(family);
        const std::vector<size_t> own = own_parts(family);
        const std::vector<size_t> parts = limit ? split(family, ranks_, *limit) : own;
        changed = changed || parts != own;
        const size_t begin = groups.size();
        for (size_t i = 0; i < parts.size(); ++i) {
          while (groups.size() <= begin + parts[i])
            groups.push_back({state_.groups[g].hyper, {}, {}});
          groups[begin + parts[i]].parameters.push_back(family.members[i]);
        }
        if (limit) tell(family, groups.size() - begin, *limit, inferred);
        g += family.count;
      } else {
        groups.push_back(state_.groups[g++]);
      }
    }
    if (!changed) return std::nullopt;
    if (check_) check_scheduler(state_, state_.groups.size(), groups.size());
    std::vector<int> group_of(state_.parameters.size(), -1);
    for (size_t g = 0; g < groups.size(); ++g) {
      for (int number : groups[g].parameters)
        group_of[static_cast<size_t>(number)] = static_cast<int>(g);
    }
    for (GroupState& group : groups) group.flat_order = group.parameters;
    std::vector<ParameterState> parameters = state_.parameters;
    for (size_t i = 0; i < parameters.size(); ++i) parameters[i].group = group_of[i];
    ShardedState result = state_;
    result.set_parameters(std::move(parameters));
    result.groups = std::move(groups);
    return result;
  }

 private:
  const ParameterState& parameter(int number) const {
    return state_.parameters[static_cast<size_t>(number)];
  }
  bool is_expert(int number) const {
    const ParameterState& found = parameter(number);
    return ExpertInfo::expert_number(found.name).has_value() ||
           (found.split >= 0 && state_.split_of(found).kind == SplitKind::kExperts);
  }
  bool holds_experts(const GroupState& group) const {
    return !group.parameters.empty() &&
           std::ranges::all_of(group.parameters, [&](int number) { return is_expert(number); });
  }

  void find_families() {
    const nlohmann::json hyper = optimizer_json(state_)["param_groups"];
    for (size_t g = 0; g < state_.groups.size(); ++g) {
      if (!holds_experts(state_.groups[g])) continue;
      const auto plain = [&](size_t group) {
        nlohmann::json entry = hyper.at(group);
        entry.erase("names");
        return entry;
      };
      const bool marked = hyper.at(g).value("moe", nlohmann::json(false)) == nlohmann::json(true);
      const bool goes_on = marked && !families_.empty() &&
                           families_.back().first + families_.back().count == g &&
                           plain(families_.back().first) == plain(g);
      if (!goes_on) families_.push_back({g, 0, marked, {}});
      Family& family = families_.back();
      ++family.count;
      const std::vector<int>& members = state_.groups[g].parameters;
      family.members.insert(family.members.end(), members.begin(), members.end());
    }
    for (Family& family : families_) {
      if (ExpertInfo::expert_number(parameter(family.members[0]).name))
        sort_native(&family.members);
    }
  }

  // The degrees that the source's groups may be of. A universal form of native experts does not say
  // it (any number that divides the experts), that of AutoEP may have the groups of a run at ep 1.
  void find_degrees() {
    degrees_ = {state_.topology.expert};
    if (state_.flavour != Flavour::kUniversal12) return;
    int64_t least = 1;
    for (const auto& [layer, count] : counts_) least = std::max(least, count);
    for (int64_t degree = 1; degree <= least && degree <= 100'000; ++degree) {
      const bool divides = std::ranges::all_of(
          counts_, [&](const auto& layer) { return layer.second % degree == 0; });
      if (divides) degrees_.push_back(static_cast<int>(degree));
    }
  }

  // By layer, then by expert; an expert's tensors in their own order.
  void sort_native(std::vector<int>* members) {
    std::map<std::string, size_t> layers;
    std::map<int, std::pair<size_t, int64_t>> places;
    for (int number : *members) {
      const auto expert = ExpertInfo::expert_number(parameter(number).name);
      const size_t layer = layers.try_emplace(expert->first, layers.size()).first->second;
      places[number] = {layer, expert->second};
      int64_t& count = counts_[expert->first];
      count = std::max(count, expert->second + 1);
    }
    std::ranges::stable_sort(*members, {}, [&](int number) { return places.at(number); });
  }

  // Experts of the parameter's layer, on all ranks.
  int64_t experts_of(int number) const {
    const auto expert = ExpertInfo::expert_number(parameter(number).name);
    return expert ? counts_.at(expert->first) : parameter(number).shape.at(0);
  }

  // By member: its group within the family, as a run with `ranks` fills them. All ranks do so
  // alike: an expert stands where that with its number stands on rank 0.
  std::vector<size_t> split(const Family& family, int ranks, int64_t most) const {
    std::vector<size_t> parts;
    std::map<std::string, size_t> of_rank0;  // native: by name
    size_t part = 0;
    int64_t filled = 0;
    for (int number : family.members) {
      const std::string& name = parameter(number).name;
      const int64_t local = experts_of(number) / ranks;
      const auto expert = ExpertInfo::expert_number(name);
      if (expert && expert->second >= local) {
        const std::string twin = ExpertInfo::global_name(name, -(expert->second / local), local);
        const auto found = of_rank0.find(twin);
        if (found == of_rank0.end()) refuse_settings(name, twin);
        parts.push_back(found->second);
        continue;
      }
      const int64_t elements = numel(parameter(number).shape) / (expert ? 1 : ranks);
      if (filled > 0 && elements > most - filled) {
        ++part;
        filled = 0;
      }
      filled += elements;
      of_rank0[name] = part;
      parts.push_back(part);
    }
    return parts;
  }

  // The groups that the members are in now.
  std::vector<size_t> own_parts(const Family& family) const {
    std::vector<size_t> parts;
    for (int number : family.members)
      parts.push_back(static_cast<size_t>(parameter(number).group) - family.first);
    return parts;
  }

  [[noreturn]] void refuse_settings(const std::string& name, const std::string& twin) const {
    throw Error(ErrorInfo{
        .code = ErrorCode::kUnsupported,
        .what = "Experts of one layer lie in optimizer groups of different settings, so that ranks "
                "would form different groups at another ep.",
        .file = state_.folder,
        .entry = quote(name),
        .expected = "a group with the settings of " + quote(twin),
        .found = "another",
        .next = "take ep=" + std::to_string(state_.topology.expert)});
  }

  // The number of elements up to which the family's groups are filled; nothing: they stay.
  std::optional<int64_t> limit_of(const Family& family) const {
    if (!check_) return most_ > 0 ? most_ : kNoLimit;
    const std::vector<size_t> own = own_parts(family);
    const int64_t most = most_ > 0 ? most_ : kMoeMaxGroupSize;
    const bool uneven = !shared_evenly(state_.topology.expert);
    const bool fits = std::ranges::any_of(degrees_, [&](int degree) {
      return shared_evenly(degree) && split(family, degree, most) == own;
    });
    if (family.marked && (fits || (uneven && family.count == 1))) return most;
    if (family.count == 1 && (most_ == 0 || !family.marked)) return std::nullopt;
    // A universal form of native experts does not say of which degree its groups are.
    const bool told = counts_.empty() || state_.flavour != Flavour::kUniversal12;
    if (told && ranks_ == state_.topology.expert) return std::nullopt;
    throw Error(ErrorInfo{
        .code = ErrorCode::kUnsupported,
        .what = "The groups of experts are not those that max_group_size gives (deepspeed/moe/"
                "utils.py), so that those at another ep are not known.",
        .file = state_.folder,
        .entry = "param_groups",
        .expected =
            "groups (moe: True) filled up to " + std::to_string(most) + " elements of a rank",
        .found = std::to_string(family.count) + " groups",
        .next = "name the max_group_size of the run with --moe-max-group-size"});
  }

  void tell(const Family& family, size_t count, int64_t limit,
            std::vector<std::string>* inferred) const {
    if (family.count == 1 && count == 1) return;
    const std::string text = "groups of experts: " + std::to_string(count) +
                             " at ep=" + std::to_string(ranks_) + ", by a max_group_size of " +
                             std::to_string(limit) + ", which gives the source's " +
                             std::to_string(family.count);
    if (std::ranges::find(*inferred, text) == inferred->end()) inferred->push_back(text);
  }

  const ShardedState& state_;
  const int ranks_;
  const int64_t most_;
  const bool check_;
  std::vector<Family> families_;
  std::vector<int> degrees_;
  std::map<std::string, int64_t> counts_;  // native: experts of a layer, by path
};

}  // namespace

void check_scheduler(const ShardedState& state, size_t before, size_t after) {
  if (after == before) return;
  const Fields model(state.document(state.model_files[0]));
  const Pickle& pickle = model.pickle();
  const NodeId scheduler = model.maybe(model.root(), "lr_scheduler");
  if (scheduler == kNoNode || !pickle.is_mapping(scheduler)) return;
  const std::vector<NodeId>& entries = pickle.entries(scheduler);
  for (size_t i = 1; i < entries.size(); i += 2) {
    const Kind kind = pickle.kind(entries[i]);
    if (kind != Kind::kList && kind != Kind::kTuple) continue;
    if (pickle.items(entries[i]).size() != before) continue;
    const bool named = pickle.kind(entries[i - 1]) == Kind::kString;
    throw Error(ErrorInfo{
        .code = ErrorCode::kUnsupported,
        .what = "The target has another number of groups of experts, and the lr_scheduler keeps a "
                "value for each.",
        .file = state.folder,
        .entry = "lr_scheduler" + (named ? " " + quote(pickle.text(entries[i - 1])) : ""),
        .expected = std::to_string(before) + " groups, as in the source",
        .found = std::to_string(after),
        .next = "take ep=" + std::to_string(state.topology.expert)});
  }
}

Regrouped regroup_experts(const ShardedState& state, int ranks, int64_t most,
                          std::vector<std::string>* inferred) {
  const bool experts = state.expert_layout != ExpertLayout::kNone;
  const bool own = ranks == state.topology.expert && state.flavour != Flavour::kUniversal12;
  if (!experts || own) return {};
  Regrouping regrouping(state, ranks, most, /*check=*/true);
  if (!regrouping.shared_evenly(ranks)) return {.state = {}, .known = false};
  return {.state = regrouping.run(inferred), .known = true};
}

std::optional<ShardedState> group_experts_anew(const ShardedState& state, int ranks, int64_t most) {
  if (state.expert_layout == ExpertLayout::kNone) return std::nullopt;
  Regrouping regrouping(state, ranks, most, /*check=*/false);
  if (!regrouping.shared_evenly(ranks)) return std::nullopt;
  std::vector<std::string> nothing;
  return regrouping.run(&nothing);
}

}  // namespace isoshard::checkpoint
