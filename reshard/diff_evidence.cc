// See diff_evidence.h.
#include "reshard/diff_evidence.h"

#include <map>

#include "checkpoint/deepspeed/universal_blueprint.h"
#include "core/cast.h"
#include "reshard/explain.h"

namespace isoshard::reshard {

using checkpoint::Leaf;
using checkpoint::ParameterState;
using checkpoint::ShardedState;

namespace {

struct Agreement {
  int checked = 0, agreed = 0;
  DType dtype = DType::kFloat32;  // of the model's own weights
};

Agreement agreement_with_model(const DiffSide& side, const std::vector<std::string>& names) {
  Agreement result;
  std::map<std::string, const ParameterState*> parameters;
  for (const ParameterState& p : side.state.parameters) parameters.emplace(p.name, &p);
  for (const std::string& name : names) {
    const auto found = parameters.find(name);
    if (found == parameters.end() || found->second->model_copy < 0) continue;
    const ParameterState& parameter = *found->second;
    const TensorValues master = values_of(side.state, parameter.weight, "weight");
    const TensorValues copy = values_of(side.state, parameter.model_copy, "param");
    if (!can_cast(master.dtype, copy.dtype)) continue;
    result.dtype = copy.dtype;
    ++result.checked;
    result.agreed += same_values(cast_values(master, copy.dtype), copy);
  }
  return result;
}

std::string right_text(const DiffSide& right, const Agreement& agreement, const DiffSide& wrong,
                       const Agreement& other) {
  return right.letter + " is right: its masters, cast to " + name(agreement.dtype) +
         ", are the weights that the model itself saved in " + std::to_string(agreement.agreed) +
         " of the " + std::to_string(agreement.checked) + " parameters that differ; those of " +
         wrong.letter + " in " + std::to_string(other.agreed);
}

}  // namespace

std::string round_robin_reason(Storage& storage, const DiffSide& source, const DiffSide& other,
                               const StreamOptions& stream) {
  const Topology& topology = source.state.topology;
  const bool several = topology.tensor > 1 || topology.expert > 1 || topology.pipeline > 1;
  if (!source.state.round_robin || several) return "";
  const ShardedState believed = checkpoint::as_deepspeed_believes(source.state);
  StreamOptions options = stream;
  options.digest.clear();
  std::vector<std::pair<int, int>> pairs;  // leaf of believed, leaf of other
  for (const auto& [section, leaves] : source.leaves.sections) {
    if (section == "buffers") continue;
    for (const LogicalLeaf& logical : leaves) {
      const int found = other.leaves.find(section, logical.name);
      if (found < 0 || !other.crcs[static_cast<size_t>(found)].known) continue;
      pairs.emplace_back(logical.leaf, found);
      options.digest.push_back(logical.leaf);
    }
  }
  if (pairs.empty()) return "";
  const std::vector<LeafCrc> crcs = digest_leaves(storage, believed, options).leaves;
  for (const auto& [x, y] : pairs) {
    const Leaf& expected = believed.leaf(x);
    const Leaf& found = other.state.leaf(y);
    const bool same = expected.dtype == found.dtype && expected.shape == found.shape &&
                      crcs[static_cast<size_t>(x)] == other.crcs[static_cast<size_t>(y)];
    if (!same) return "";
  }
  return other.letter +
         " holds what DeepSpeed's converter makes of round_robin_gradients: slices of the "
         "optimizer's order over a buffer that lies in another order (docs/deepspeed_errata.md); "
         "proven: all " +
         std::to_string(pairs.size()) + " leaves of " + other.letter +
         " have the CRCs of that reading of " + source.letter;
}

std::string which_is_right(const DiffSide& a, const DiffSide& b,
                           const std::vector<std::string>& names) {
  const Agreement of_a = agreement_with_model(a, names), of_b = agreement_with_model(b, names);
  const bool a_agrees = of_a.checked > 0 && of_a.agreed == of_a.checked;
  const bool b_agrees = of_b.checked > 0 && of_b.agreed == of_b.checked;
  if (a_agrees && of_b.checked > 0 && !b_agrees) return right_text(a, of_a, b, of_b);
  if (b_agrees && of_a.checked > 0 && !a_agrees) return right_text(b, of_b, a, of_a);
  return "";
}

}  // namespace isoshard::reshard
