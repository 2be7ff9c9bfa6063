// See laws.h. The law of plans, and the reference's own.
#include <algorithm>
#include <map>

#include "checkpoint/deepspeed/names.h"
#include "properties/laws.h"
#include "properties/workshop.h"
#include "reshard/plan.h"

namespace isoshard::properties {

using checkpoint::ShardedState;

namespace {

using Runs = std::vector<std::pair<int64_t, int64_t>>;  // begin, count
using RunsOfRanks = std::map<int, Runs>;                // by tensor-parallel rank

std::string leaf_difference(const checkpoint::Leaf& leaf, Runs runs) {
  std::sort(runs.begin(), runs.end());
  const std::string what = leaf.name + " " + leaf.state;
  int64_t next = 0;
  for (const auto& [begin, count] : runs) {
    if (begin != next) return what + ": gap or overlap at " + std::to_string(next);
    next += count;
  }
  return next == leaf.size_elements() ? "" : what + ": ends at " + std::to_string(next);
}

// Ranks hold each a part, or each the whole.
std::string ranks_difference(const checkpoint::Leaf& leaf, const RunsOfRanks& ranks) {
  Runs all;
  bool each_whole = !ranks.empty();
  for (const auto& [rank, runs] : ranks) {
    all.insert(all.end(), runs.begin(), runs.end());
    each_whole = each_whole && leaf_difference(leaf, runs).empty();
  }
  return each_whole ? "" : leaf_difference(leaf, all);
}

}  // namespace

std::string cover_difference(const ShardedState& state,
                             const std::vector<checkpoint::FileBlueprint>& files, int stage) {
  std::map<int, RunsOfRanks> runs;  // of each leaf
  for (const checkpoint::FileBlueprint& file : files) {
    using Kind = checkpoint::FileName::Kind;
    const checkpoint::FileName name = checkpoint::parse_file_name(file.path);
    if (stage > 0 && name.kind != Kind::kOptim) continue;
    for (const checkpoint::StorageFill& fill : file.storages) {
      for (const checkpoint::LeafRun& run : fill.runs) {
        const bool cast = state.leaf(run.leaf).dtype != fill.dtype;  // stage 0: the module's copy
        if (!cast) runs[run.leaf][name.mp].emplace_back(run.begin, run.count);
      }
    }
  }
  for (const checkpoint::ParameterState& parameter : state.parameters) {
    if (parameter.group < 0) continue;
    std::vector<int> leaves = parameter.states;
    // At stage 0 a float32 module is the master, whichever of two equal leaves it is copied from.
    const bool single = stage == 0 && parameter.model_dtype == DType::kFloat32;
    if (!single) leaves.push_back(parameter.weight);
    for (int leaf : leaves) {
      const std::string reason = ranks_difference(state.leaf(leaf), runs[leaf]);
      if (!reason.empty()) return reason;
    }
  }
  return "";
}

// make_plan CHECKs besides that the source's fragments cover every run.
std::string every_plan_covers(const Case& value, Mutant mutant) {
  Workshop workshop(value.model, mutant);
  const ShardedState a = workshop.source(value.a, "/a");
  const ShardedState source = workshop.with_splits(a, value.b);
  const reshard::ReshardPlan plan =
      reshard::make_plan(source, workshop.blueprints(source, value.b));
  return cover_difference(source, plan.blueprints, value.b.stage);
}

std::string reference_is_its_own_inverse(const Case& value, Mutant mutant) {
  const reference::Groups whole = whole_state(value.model, -1);
  const reference::GroupSizes sizes = group_sizes(value.model);
  const reference::Form a = form_of(value.model, value.a), b = form_of(value.model, value.b);
  const uint32_t padding = poison(DType::kFloat32);
  reference::RankBuffers held = reference::partition(whole, a, padding);
  if (mutant == Mutant::kExchangedRanks && held.size() > 1) std::swap(held[0], held[1]);
  if (reference::gather(held, sizes, a) != whole) return "gather does not undo partition";
  const reference::RankBuffers there = reference::reshard(held, sizes, {a, b, 0});
  const reference::RankBuffers back = reference::reshard(there, sizes, {b, a, padding});
  return back == held ? "" : "there and back differs";
}

}  // namespace isoshard::properties
