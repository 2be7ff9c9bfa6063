// See not_verified.h.
#include "reshard/not_verified.h"

#include <algorithm>

#include "reshard/report_text.h"

namespace isoshard::reshard {

using checkpoint::Flavour;
using checkpoint::ShardedState;

void say_what_is_not_verified(const ShardedState& state, bool manifest_holds, bool replicas,
                              Verification* result) {
  std::vector<std::string>& list = result->not_verified;
  list.insert(list.end(), state.not_verified.begin(), state.not_verified.end());
  if (!manifest_holds && state.files.size() > 1) {
    list.push_back(
        "whether all files are of one run: two runs at the same step cannot be told "
        "apart without a manifest");
  }
  const Flavour flavour = state.flavour;
  if (flavour == Flavour::kWeights) {
    list.push_back("optimizer, steps and schedule: this format holds weights only");
    const auto plain = std::ranges::count_if(state.files, [](const auto& f) { return !f.torch; });
    if (plain > 0 && !manifest_holds) {
      list.push_back("payload bytes of " +
                     count_of(static_cast<size_t>(plain), "safetensors file") +
                     ": the format has no checksum");
    }
    return;
  }
  if (flavour == Flavour::kZero3 || flavour == Flavour::kUniversal3) {
    list.push_back("values of trained parameters: at stage 3 they have no second copy");
  }
  if (flavour == Flavour::kZero3) {
    list.push_back(std::string(replicas ? "padding" : "buffers of ranks above 0, and padding") +
                   ": their bytes fit their CRCs, their values are not looked at");
  }
  if (flavour == Flavour::kZero0 && result->copies.pairs[0] == 0 && state.stepped) {
    list.push_back(
        "which parameter each optimizer state belongs to: known by shape and order only");
  }
  if (!state.stepped) return;
  list.push_back(state.replicas.empty()
                     ? "values of optimizer states: they are stored once"
                     : "values of optimizer states that no other rank holds: they are stored once");
}

}  // namespace isoshard::reshard
