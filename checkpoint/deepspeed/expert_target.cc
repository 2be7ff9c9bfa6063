// How a target's expert-parallel ranks share the experts.
#include <algorithm>
#include <map>

#include "checkpoint/deepspeed/experts.h"
#include "checkpoint/deepspeed/reshard_target.h"
#include "core/error.h"
#include "core/split_rules.h"

namespace isoshard::checkpoint {
namespace {

// Experts by rank. Error(kUnsupported) where the ranks do not divide them, unless DeepSpeed's files
// can say it (AutoEP's placement) and it is wanted.
std::vector<int64_t> share(ReshardTarget* whole, const std::string& name, int64_t experts,
                           bool autoep) {
  const ReshardTarget& target = *whole;
  const int ranks = target.topology.expert;
  const std::vector<int64_t> widths = split_widths({}, experts, ranks, "");
  const bool fits = target.expert_world() % ranks == 0 && ranks <= experts;
  if (fits && experts % ranks == 0) return widths;
  std::string shares;
  for (int64_t width : widths) shares += " " + std::to_string(width);
  if (fits && autoep && target.beyond_deepspeed) {
    whole->beyond.insert(
        "ep=" + std::to_string(ranks) + " does not divide the " + std::to_string(experts) +
        " experts of a layer, which lie on its ranks as" + shares +
        "; DeepSpeed refuses to load this (ValueError: not divisible by autoep_size)" +
        (target.stage == 3 ? ", and converts it to universal from 0.19.8 on"
                           : ", and to convert it (RuntimeError: expert count mismatch)"));
    return widths;
  }
  std::string divisors;
  for (int64_t d = 1; d <= experts; ++d) {
    if (experts % d == 0 && target.expert_world() % d == 0) divisors += " " + std::to_string(d);
  }
  throw Error(
      ErrorInfo{.code = ErrorCode::kUnsupported,
                .what = "The experts of a layer cannot be shared evenly (DeepSpeed: ValueError).",
                .file = target.state.folder,
                .entry = quote(name),
                .expected = "ep that divides " + std::to_string(experts) +
                            " experts and dp*sp = " + std::to_string(target.ranks) + ":" + divisors,
                .found = "ep=" + std::to_string(ranks),
                .next = fits && autoep ? "take another ep; or pass --beyond-deepspeed for" +
                                             shares + " experts, which DeepSpeed will not load"
                                       : "take another ep or dp"});
}

// The maps of AutoEP's stacks, and how many experts of each native layer a rank holds.
void share_experts(ReshardTarget* target) {
  const ShardedState& state = target->state;
  std::map<std::string, int64_t> totals;
  target->maps.resize(state.parameters.size());
  for (size_t i = 0; i < state.parameters.size(); ++i) {
    const ParameterState& parameter = state.parameters[i];
    if (!target->is_expert(static_cast<int>(i))) continue;
    if (const auto expert = ExpertInfo::expert_number(parameter.name)) {
      totals[expert->first] = std::max(totals[expert->first], expert->second + 1);
      continue;
    }
    target->maps[i] =
        split_map(parameter.shape, 0, {share(target, parameter.name, parameter.shape.at(0), true)});
  }
  for (const auto& [layer, experts] : totals)
    target->local_experts[layer] = share(target, layer, experts, false).at(0);
}

// Stage 0 alone takes a group like that; the other stages want experts in groups of their own.
[[noreturn]] void refuse_mixed(const ReshardTarget& target, size_t group) {
  throw Error(ErrorInfo{
      .code = ErrorCode::kUnsupported,
      .what = "An optimizer group holds experts and other parameters, as stage 0 alone allows.",
      .file = target.state.folder,
      .entry = "group " + std::to_string(group),
      .expected = "experts in groups of their own (moe: True)",
      .found = std::to_string(target.state.groups[group].parameters.size()) + " parameters of both",
      .next = "--to fp32 writes the weights; reshard and universal need groups apart, as "
              "split_params_into_different_moe_groups_for_optimizer makes them"});
}

// Among those that share the experts: tensor-parallel ranks turn fastest.
int member_of(const ReshardTarget& target, TargetRank rank) {
  return target.folded() ? rank.zero * target.topology.tensor + rank.mp : rank.zero;
}

// Files of folded experts are named by the tensor-parallel rank that writes them.
void check_folded(const ReshardTarget& target) {
  for (size_t i = 0; i < target.state.parameters.size(); ++i) {
    const ParameterState& parameter = target.state.parameters[i];
    if (!target.is_expert(static_cast<int>(i)) ||
        target.maps[i] == target.state.split_of(parameter).map)
      continue;
    throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                          .what = "Folded experts that do not lie in blocks are not written.",
                          .file = target.state.folder,
                          .entry = quote(parameter.name),
                          .expected = "an expert_placement in blocks",
                          .found = "another",
                          .next = "say tp=1"});
  }
}

}  // namespace

void prepare_experts(ReshardTarget* target, bool grouped) {
  const ShardedState& state = target->state;
  const bool native = state.expert_layout == ExpertLayout::kNative;
  if (target->stage == 3 && native) {
    throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                          .what = "DeepSpeed has no native MoE at stage 3 (AssertionError).",
                          .file = state.folder,
                          .expected = "stage=0, 1 or 2",
                          .found = "stage=3"});
  }
  if (target->stage == 3 && target->topology.sequence > 1) {
    throw Error(ErrorInfo{
        .code = ErrorCode::kUnsupported,
        .what = "DeepSpeed has no AutoEP with sequence parallelism at stage 3 (AssertionError).",
        .file = state.folder,
        .expected = "sp=1, or stage=0, 1 or 2",
        .found = to_string(target->topology) + ", stage=3",
        .next = "say sp=1 (its ranks as dp), or another stage"});
  }
  target->experts =
      std::make_shared<ExpertInfo>(state, read_model_states(state, target->model_file()));
  const ExpertInfo& experts = *target->experts;
  for (size_t g = 0; g < state.groups.size(); ++g) {
    const std::vector<int>& members = state.groups[g].parameters;
    const auto held = std::ranges::count_if(
        members, [&](int number) { return experts.is_expert(target->parameter(number).name); });
    target->expert_groups[g] = held > 0;
    if (held > 0 && held < static_cast<int64_t>(members.size())) refuse_mixed(*target, g);
  }
  share_experts(target);
  const auto groups = std::ranges::count(target->expert_groups, true);
  if (!grouped && groups > 1 && target->topology.expert != state.topology.expert) {
    throw Error(ErrorInfo{
        .code = ErrorCode::kUnsupported,
        .what = "The experts lie in several optimizer groups, whose borders depend on ep.",
        .file = state.folder,
        .entry = "param_groups",
        .expected = "one group of experts, or ep=" + std::to_string(state.topology.expert),
        .found = std::to_string(groups) + " groups, ep=" + std::to_string(target->topology.expert),
        .next = "take an ep that divides the experts"});
  }
  if (target->folded()) check_folded(*target);
  const int ranks = target->topology.expert;
  target->expert_buffers.resize(static_cast<size_t>(ranks));
  for (int rank = 0; rank < ranks; ++rank)
    target->expert_partitions.push_back(
        experts.partition_ranks(rank, ranks, target->expert_world()));
}

void number_parameters(ReshardTarget* target) {
  const ShardedState& state = target->state;
  const auto number = [&](const std::string& name) {
    target->creation_numbers.emplace(name, target->creation_numbers.size());
  };
  const ExpertLayer* open = nullptr;  // the layer whose router is passing by
  const auto close = [&] {
    for (const char* stack : {".w1", ".w2", ".w3"}) {
      if (open != nullptr && state.find_parameter(open->prefix + stack) != nullptr)
        number(open->prefix + stack);
    }
    open = nullptr;
  };
  for (const std::string& name : state.module_order) {
    if (state.find_parameter(name) == nullptr) continue;
    const ExpertLayer* layer = target->experts ? target->experts->layer_around(name) : nullptr;
    const bool router = layer != nullptr && name.starts_with(router_of(*layer));
    if (open != nullptr && (!router || layer != open)) close();
    number(name);
    if (router) open = layer;
  }
  close();
}

std::vector<const TargetBuffer*> buffers_of(const ReshardTarget& target, TargetRank rank) {
  std::vector<const TargetBuffer*> result;
  for (const TargetBuffer& buffer : target.buffers[static_cast<size_t>(rank.mp)])
    result.push_back(&buffer);
  for (size_t e = 0; e < target.expert_partitions.size(); ++e) {
    const std::vector<int>& members = target.expert_partitions[e];
    if (std::find(members.begin(), members.end(), member_of(target, rank)) == members.end())
      continue;
    for (const TargetBuffer& buffer : target.expert_buffers[e]) result.push_back(&buffer);
  }
  std::stable_sort(result.begin(), result.end(), [](const TargetBuffer* a, const TargetBuffer* b) {
    return a->group < b->group;
  });
  return result;
}

ExpertRank expert_rank_of(const ReshardTarget& target, TargetRank rank) {
  for (size_t e = 0; e < target.expert_partitions.size(); ++e) {
    const std::vector<int>& members = target.expert_partitions[e];
    const auto found = std::find(members.begin(), members.end(), member_of(target, rank));
    if (found != members.end())
      return {static_cast<int>(e), static_cast<int>(found - members.begin())};
  }
  return {};
}

int rank_in(const ReshardTarget& target, const TargetBuffer& buffer, TargetRank rank) {
  if (!buffer.experts) return rank.zero;
  const std::vector<int>& members = target.expert_partitions[static_cast<size_t>(buffer.shard)];
  return static_cast<int>(std::find(members.begin(), members.end(), member_of(target, rank)) -
                          members.begin());
}

bool ReshardTarget::holds_expert(int expert_rank, int number) const {
  const auto expert = ExpertInfo::expert_number(parameter(number).name);
  return !expert || expert->second / local_experts.at(expert->first) == expert_rank;
}

std::string ReshardTarget::name_of(int number, const TargetBuffer& buffer) const {
  const std::string& name = parameter(number).name;
  const auto expert = buffer.experts ? ExpertInfo::expert_number(name) : std::nullopt;
  if (!expert) return name;
  return ExpertInfo::global_name(name, -buffer.shard, local_experts.at(expert->first));
}

}  // namespace isoshard::checkpoint
