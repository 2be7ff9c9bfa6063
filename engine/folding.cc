// See folding.h.
#include "engine/folding.h"

#include <utility>
#include <variant>

#include "core/error.h"
#include "engine/expert_files.h"

namespace isoshard::engine {
namespace {

using checkpoint::NodeId;
using checkpoint::TorchBuilder;

using Value = std::variant<int64_t, std::string>;
using Values = std::vector<std::pair<std::string, Value>>;

constexpr const char* kFamilies = "param_families";
constexpr const char* kReshard =
    "load it at the topology that saved it, or isoshard reshard --to tp=1[,dp=,ep=] first";

Values shared_by(const std::string& group, int64_t rank, int64_t ranks) {
  return {{"zero_partition_group", group},
          {"zero_partition_rank", rank},
          {"zero_partition_count", ranks}};
}

// Everything but the families of the parameters.
Values values_of(const RankPlace& place, FoldedFile file) {
  const Topology& t = place.topology;
  Values values = {
      {"version", 1},        {"tp_size", t.tensor},        {"tp_rank", place.at.tensor},
      {"ep_size", t.expert}, {"ep_rank", place.at.expert}, {"etp_size", 1},
      {"etp_rank", 0}};
  const Values shared = file == FoldedFile::kExpert
                            ? shared_by("edp", place.at.expert_data, place.expert_data_ranks())
                            : shared_by(file == FoldedFile::kModel ? "dense_dp" : "per_family",
                                        place.zero_rank(), t.zero_ranks());
  values.insert(values.end(), shared.begin(), shared.end());
  constexpr const char* kNames[] = {"dense", "routed_expert", "zero_optimizer_state"};
  values.emplace_back("dispatch_strategy", "route_full_partition_dispatch");
  values.emplace_back("shared_expert_placement", "tp_sharded");
  values.emplace_back("family", kNames[static_cast<size_t>(file)]);
  return values;
}

std::string family_of(const std::string& name, FoldedFile file) {
  const auto has = [&](const char* part) { return name.find(part) != std::string::npos; };
  if (file == FoldedFile::kOptimizer && has(".experts.")) return "routed_expert";
  if (has(".router.")) return "router_gate_replicated";
  return has(".shared_experts") ? "shared_expert" : "dense";
}

// What the optimizer's file says of a parameter.
Values values_of(const RankPlace& place, const std::string& name) {
  const std::string family = family_of(name, FoldedFile::kOptimizer);
  Values values = {{"family", family}};
  const Values shared = family == "routed_expert"
                            ? shared_by("edp", place.at.expert_data, place.expert_data_ranks())
                            : shared_by("dense_dp", place.zero_rank(), place.topology.zero_ranks());
  values.insert(values.end(), shared.begin(), shared.end());
  return values;
}

std::vector<std::pair<std::string, NodeId>> entries_of(TorchBuilder* builder,
                                                       const Values& values) {
  std::vector<std::pair<std::string, NodeId>> entries;
  for (const auto& [key, value] : values) {
    const NodeId node = std::holds_alternative<int64_t>(value)
                            ? builder->pickle.integer(std::get<int64_t>(value))
                            : builder->pickle.string(std::get<std::string>(value));
    entries.emplace_back(key, node);
  }
  return entries;
}

// In the optimizer's order.
std::vector<std::string> optimizer_names(const TrainingState& state) {
  std::vector<std::string> names;
  for (const TrainedGroup& group : state.groups) {
    for (const int number : group.parameters) {
      const TrainedParameter& p = state.parameters[static_cast<size_t>(number)];
      if (numel(p.shape) > 0) names.push_back(p.name);
    }
  }
  return names;
}

std::string text_of(const Value& value) {
  return std::holds_alternative<int64_t>(value) ? std::to_string(std::get<int64_t>(value))
                                                : quote(std::get<std::string>(value));
}

[[noreturn]] void refuse(const RankReader& file, const std::string& what, const std::string& entry,
                         const std::string& expected, const std::string& found,
                         const std::string& next = kReshard) {
  throw Error(ErrorInfo{.code = ErrorCode::kMismatch,
                        .what = what,
                        .file = file.fields().document().path(),
                        .entry = entry,
                        .expected = expected,
                        .found = found,
                        .next = next});
}

void check_values(const RankReader& file, NodeId node, const Values& expected,
                  const std::string& where) {
  for (const auto& [key, value] : expected) {
    const NodeId found = file.need(node, key);
    const Value read = std::holds_alternative<int64_t>(value)
                           ? Value(file.fields().integer(found, key))
                           : Value(file.fields().text(found, key));
    if (read == value) continue;
    refuse(file,
           "The file is of another place among folded ranks (DeepSpeed: RuntimeError, \"Folding "
           "metadata mismatch\").",
           where + key, text_of(value), text_of(read));
  }
}

}  // namespace

bool is_folded(const TrainingState& state, const Topology& topology) {
  return has_experts(state) && topology.tensor > 1;
}

NodeId folding_node(TorchBuilder* builder, const TrainingState& state, const RankPlace& place,
                    FoldedFile file, const std::vector<std::string>& module) {
  auto entries = entries_of(builder, values_of(place, file));
  if (file == FoldedFile::kExpert) return builder->dict(std::move(entries));
  std::vector<std::pair<std::string, NodeId>> families;
  for (const std::string& name : file == FoldedFile::kModel ? module : optimizer_names(state)) {
    families.emplace_back(name, file == FoldedFile::kModel
                                    ? builder->pickle.string(family_of(name, file))
                                    : builder->dict(entries_of(builder, values_of(place, name))));
  }
  entries.emplace_back(kFamilies, builder->dict(std::move(families)));
  return builder->dict(std::move(entries));
}

void check_folding(const RankReader& file, const TrainingState& state, const RankPlace& place,
                   FoldedFile kind) {
  const checkpoint::Fields& fields = file.fields();
  const NodeId folding = fields.maybe(fields.root(), "folding");
  if ((folding != checkpoint::kNoNode) != is_folded(state, place.topology)) {
    refuse(file,
           folding != checkpoint::kNoNode
               ? "The file is of experts folded with tensor-parallel ranks, the run is not "
                 "(DeepSpeed: RuntimeError, \"requires a folded runtime\")."
               : "The run folds experts with tensor-parallel ranks, the file does not (DeepSpeed: "
                 "RuntimeError, \"Missing AutoEP+AutoTP folding metadata\").",
           "folding", to_string(place.topology),
           folding != checkpoint::kNoNode ? "an entry" : "no entry",
           folding != checkpoint::kNoNode ? kReshard
                                          : "resume it at tp=1; no reshard leads to folded ranks");
  }
  if (folding == checkpoint::kNoNode) return;
  Values expected = values_of(place, kind);
  std::erase_if(expected, [&](const auto& entry) {  // any of those who hold the same
    return (kind != FoldedFile::kOptimizer && entry.first == "zero_partition_rank") ||
           (kind == FoldedFile::kModel && entry.first == "ep_rank");
  });
  check_values(file, folding, expected, "folding ");
  if (kind != FoldedFile::kOptimizer) return;
  const std::vector<std::string> names = optimizer_names(state);
  const auto families = fields.named(file.need(folding, kFamilies), kFamilies);
  if (families.size() != names.size()) {
    refuse(file, "The file names other parameters than the run has.",
           std::string("folding ") + kFamilies, std::to_string(names.size()),
           std::to_string(families.size()));
  }
  for (const std::string& name : names) {
    check_values(file, file.need(file.need(folding, kFamilies), name), values_of(place, name),
                 "folding " + quote(name) + " ");
  }
}

}  // namespace isoshard::engine
