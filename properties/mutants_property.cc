// The laws judged: each mutant must be noticed by the law that stands against it. The cases are the
// generators' own, from fixed seeds, so a survivor survives on every machine.
#include <gtest/gtest.h>

#include "properties/check_property.h"

namespace isoshard::properties {
namespace {

struct Duel {
  Mutant mutant = Mutant::kNone;
  Law law = nullptr;
  bool many_ranks = false;
  bool experts = false;
};

std::string small_layouts(const Case&, Mutant mutant) {
  return layouts_are_the_reference(20, mutant);
}

std::string small_splits(const Case&, Mutant mutant) {
  return splits_are_the_reference({.rows = 8}, mutant);
}
std::string heads_alone(const Case&, Mutant mutant) { return heads_keep_their_ratio(mutant); }

void PrintTo(const Duel& duel, std::ostream* out) { *out << name(duel.mutant); }

const Duel kDuels[] = {
    {Mutant::kCeilWidths, small_splits},
    {Mutant::kCutHeads, heads_alone},
    {Mutant::kColumnForRow, small_splits},
    {Mutant::kSwappedShards, files_are_the_reference},
    {Mutant::kShiftedStage, files_are_the_reference},
    {Mutant::kTransposedRanks, files_are_the_reference},
    {Mutant::kStaleLayers, files_are_the_reference},
    {Mutant::kSwappedExperts, experts_keep_what_is_theirs, false, true},
    {Mutant::kSwappedStacks, experts_keep_what_is_theirs, false, true},
    {Mutant::kDoubledExpert, experts_keep_what_is_theirs, false, true},
    {Mutant::kKeptGroups, experts_keep_what_is_theirs, false, true},
    {Mutant::kShiftedRun, files_are_the_reference},
    {Mutant::kAlphabeticalRanks, every_element_is_loaded, true},
    {Mutant::kKeptPadding, no_padding_leaves_its_file},
    {Mutant::kDroppedParameter, every_element_is_loaded},
    {Mutant::kUnpermutedGroups, files_are_the_reference},
    {Mutant::kFloorSlots, there_and_back_is_identity},
    {Mutant::kSwappedStates, via_is_direct},
    {Mutant::kRoundedMaster, every_element_is_loaded},
    {Mutant::kMisnamedSlots, names_are_inferred_or_refused},
    {Mutant::kForgottenRank, every_plan_covers},
    {Mutant::kExchangedRanks, reference_is_its_own_inverse},
    {Mutant::kBelievedUniversal, universal_keeps_everything},
    {Mutant::kTruncatedWeights, weights_are_the_masters},
    {Mutant::kFileDigest, digest_is_constant},
    {Mutant::kMergedSections, one_bit_changes_one_section},
    {Mutant::kUncheckedRecords, a_damaged_file_is_refused},
    {Mutant::kPlacelessDigest, a_swap_changes_the_digest},
    {Mutant::kListedRanks, listing_order_is_nothing},
    {Mutant::kLongFragment, small_layouts},
    {Mutant::kLostFragment, small_layouts},
};

std::string outcome(const Duel& duel, const Case& value, Mutant mutant) {
  try {
    return duel.law(value, mutant);
  } catch (const std::exception& failure) {
    return failure.what();
  }
}

class Mutants : public testing::TestWithParam<Duel> {};

TEST_P(Mutants, IsKilled) {
  const Duel& duel = GetParam();
  const rc::Gen<Case> cases = duel.experts      ? any_expert_case()
                              : duel.many_ranks ? case_of_many_ranks()
                                                : any_case();
  expect_killed(1, 500, [&](uint64_t seed, bool mutated) {
    const Case value = cases(rc::Random(seed), 100).value();
    return outcome(duel, value, mutated ? duel.mutant : Mutant::kNone);
  });
}

INSTANTIATE_TEST_SUITE_P(All, Mutants, testing::ValuesIn(kDuels),
                         [](const auto& info) { return name(info.param.mutant); });

}  // namespace
}  // namespace isoshard::properties
