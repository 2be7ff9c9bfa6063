// See agreement.h.
#include "reshard/agreement.h"

#include <algorithm>
#include <map>

#include "core/cast.h"
#include "core/error.h"
#include "core/mutant.h"
#include "reshard/report_text.h"

namespace isoshard::reshard {
namespace {

using checkpoint::Flavour;
using checkpoint::ShardedState;

std::string describe_difference(const CopyDifference& d) {
  const char* side = d.pair.kind == CopyPair::Kind::kMaster ? ": master " : ": original ";
  const std::string rounded = d.expected == d.original ? "" : " rounds to " + d.expected;
  return quote(d.pair.name) + d.index + side + d.original + rounded + ", the copy holds " +
         d.found + "; " + std::to_string(d.differing) + " of " +
         count_of(static_cast<size_t>(d.total), "element") + " differ";
}

std::string cause_of(const ShardedState& state) {
  if (state.flavour != Flavour::kUniversal12 && state.flavour != Flavour::kUniversal3) {
    return "A script may have loaded weights without their masters; training would go on from the "
           "masters.";
  }
  return state.round_robin
             ? "The source was trained with round_robin_gradients, under which DeepSpeed's own "
               "converter swaps parameters; convert it again with isoshard."
             : "The conversion may have mixed up parameters; convert the source again.";
}

}  // namespace

std::vector<std::string> tell_differences(const ShardedState& state, const CopyReport& report,
                                          const std::vector<std::string>& orphans) {
  std::vector<std::string> result, details[4];
  if (!orphans.empty())
    result.push_back(with_details("Tied names whose target is not there.", orphans));
  for (const CopyDifference& d : report.differences)
    details[static_cast<int>(d.pair.kind)].push_back(describe_difference(d));
  if (!details[0].empty()) {
    result.push_back(with_details("fp32 master does not round to the model's own copy in " +
                                      std::to_string(details[0].size()) + " of " +
                                      count_of(static_cast<size_t>(report.pairs[0]), "parameter") +
                                      ".\n" + cause_of(state),
                                  details[0]));
  }
  if (!details[1].empty()) {
    result.push_back(with_details(
        "What zero/<name>/fp32.pt says differs from the model's own tensor, in " +
            std::to_string(details[1].size()) + " of " + std::to_string(report.pairs[1]) + ".",
        details[1]));
  }
  if (!details[2].empty())
    result.push_back(with_details("Tied names hold different values.", details[2]));
  if (!details[3].empty()) {
    result.push_back(with_details("Ranks differ in what they hold alike, in " +
                                      std::to_string(details[3].size()) + " of " +
                                      count_of(static_cast<size_t>(report.pairs[3]), "replica") +
                                      ". The first rank's counts.",
                                  details[3]));
  }
  return result;
}

Agreement::Agreement(const ShardedState& state) : state_(state) {
  pairs_ = copy_pairs(state, &orphans_);
  std::erase_if(pairs_, [&](const CopyPair& pair) {
    const checkpoint::Leaf &original = state.leaf(pair.original), &copy = state.leaf(pair.copy);
    return original.size_elements() != copy.size_elements() ||
           !can_cast(original.dtype, copy.dtype);  // verify lists these as not compared
  });
}

void Agreement::ask(StreamOptions* options) {
  std::map<int, int> numbers;  // of leaves in options->casts
  casts_.clear();
  for (const CopyPair& pair : pairs_) {
    const DType dtype = state_.leaf(pair.copy).dtype;
    options->digest.push_back(pair.original);
    options->digest.push_back(pair.copy);
    int number = -1;
    if (state_.leaf(pair.original).dtype != dtype) {
      const auto [known, fresh] =
          numbers.emplace(pair.original, static_cast<int>(options->casts.size()));
      if (fresh) options->casts.push_back({pair.original, dtype});
      number = known->second;
    }
    casts_.push_back(number);
  }
  options->digest.insert(options->digest.end(), state_.witnesses.begin(), state_.witnesses.end());
  std::ranges::sort(options->digest);
  const auto repeated = std::ranges::unique(options->digest);
  options->digest.erase(repeated.begin(), repeated.end());
}

std::vector<std::string> Agreement::judge(const StreamOptions& options,
                                          const StreamResult& result) const {
  std::vector<CopyPair> doubtful;
  for (size_t i = 0; i < pairs_.size(); ++i) {
    const LeafCrc& copy = result.leaves[static_cast<size_t>(pairs_[i].copy)];
    const auto cast = static_cast<size_t>(std::max(casts_[i], 0));
    const bool fits =
        casts_[i] < 0 || options.casts[cast].dtype == state_.leaf(pairs_[i].copy).dtype;
    const LeafCrc& original =
        casts_[i] < 0 ? result.leaves[static_cast<size_t>(pairs_[i].original)] : result.casts[cast];
    if ((!fits || original != copy) && !mutant("copies_not_compared"))
      doubtful.push_back(pairs_[i]);
  }
  CopyReport report = compare_copies(state_, doubtful, options.workers);
  for (int64_t& count : report.pairs) count = 0;
  for (const CopyPair& pair : pairs_) ++report.pairs[static_cast<int>(pair.kind)];
  return tell_differences(state_, report, orphans_);
}

}  // namespace isoshard::reshard
