// See pipeline_rules.h.
#include "core/pipeline_rules.h"

#include <algorithm>
#include <limits>

#include "core/mutant.h"

namespace isoshard {

std::vector<int> uniform_parts(int layers, int stages) {
  std::vector<int> parts(static_cast<size_t>(stages) + 1, 0);
  const int share = layers / stages, rest = layers % stages;
  for (int stage = 0; stage < stages; ++stage)
    parts[static_cast<size_t>(stage) + 1] =
        parts[static_cast<size_t>(stage)] + share +
        ((mutant("pipeline_remainder_last") ? stage >= stages - rest : stage < rest) ? 1 : 0);
  return parts;
}

namespace {

// The best way found to cut a prefix of the layers into some number of stages.
struct Cut {
  double cost = std::numeric_limits<double>::infinity();
  double most = std::numeric_limits<double>::infinity();   // elements of the heaviest stage
  double least = std::numeric_limits<double>::infinity();  // and of the lightest
  int last = 0;                                            // first layer of the last stage
};

}  // namespace

std::vector<int> balanced_parts(const std::vector<int64_t>& weights, int stages) {
  const auto layers = static_cast<int>(weights.size());
  if (layers <= stages) return uniform_parts(layers, stages);
  std::vector<double> before(weights.size() + 1, 0.0);  // elements of the layers before
  for (size_t i = 0; i < weights.size(); ++i)
    before[i + 1] = before[i] + static_cast<double>(weights[i]);
  // By number of stages, then of layers.
  std::vector<std::vector<Cut>> cuts(static_cast<size_t>(stages) + 1,
                                     std::vector<Cut>(weights.size() + 1));
  cuts[0][0].cost = cuts[0][0].most = 0;
  for (size_t stage = 1; stage < cuts.size(); ++stage) {
    for (size_t end = stage; end <= weights.size(); ++end) {
      Cut& best = cuts[stage][end];
      for (size_t begin = stage - 1; begin < end; ++begin) {
        const Cut& prefix = cuts[stage - 1][begin];
        const double own = before[end] - before[begin];
        const double most = std::max(prefix.most, own), least = std::min(prefix.least, own);
        if (most - least > best.cost || (mutant("pipeline_tie_first") && most - least == best.cost))
          continue;
        best = {
            .cost = most - least, .most = most, .least = least, .last = static_cast<int>(begin)};
      }
    }
  }
  std::vector<int> parts = {layers};
  for (size_t stage = cuts.size() - 1; stage > 0; --stage)
    parts.push_back(cuts[stage][static_cast<size_t>(parts.back())].last);
  std::ranges::reverse(parts);
  return parts;
}

}  // namespace isoshard
