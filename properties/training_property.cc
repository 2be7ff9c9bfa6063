// The laws of training, run and judged: each on generated cases, and each mutant must be noticed by
// the law that stands against it.
#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <iostream>

#include "core/random.h"
#include "properties/check_property.h"
#include "properties/lifecycle.h"
#include "properties/training_laws.h"
#include "sim/topologies/catalog.h"

namespace isoshard::properties {
namespace {

// RapidCheck shrinks every number towards its low end.
int64_t drawn_by_rapidcheck(int64_t low, int64_t high) {
  return *rc::gen::inRange<int64_t>(low, high + 1);
}

void check_training_law(TrainingLaw law, int share) {
  check_body([law] { return law(drawn_by_rapidcheck, TrainingMutant::kNone); }, share);
}

TEST(Sums, DoNotKnowOwners) { check_training_law(sums_do_not_know_owners, 1); }
TEST(Groups, AreBijections) { check_training_law(groups_are_bijections, 1); }
TEST(Data, EachSampleIsConsumedOnce) { check_training_law(each_sample_is_consumed_once, 1); }
TEST(Data, SlicesHaveTheSamplesLabels) { check_training_law(slices_have_the_samples_labels, 1); }
TEST(Ulysses, HeadsAreSharedOut) { check_training_law(heads_are_shared_out, 1); }
TEST(Ulysses, IsAttention) { check_training_law(ulysses_is_attention, 1); }
TEST(Training, LossDoesNotKnowRanks) { check_training_law(loss_does_not_know_ranks, 3); }
TEST(Training, StagesAreOne) { check_training_law(stages_are_one, 10); }
TEST(Training, NormsCountEachElementOnce) { check_training_law(norms_count_each_element_once, 3); }
TEST(Training, AResumedRunIsOneRun) { check_training_law(a_resumed_run_is_one_run, 5); }
TEST(Training, TheSeedIsTheRun) { check_training_law(the_seed_is_the_run, 10); }
TEST(Training, EvaluationChangesNothing) { check_training_law(evaluation_changes_nothing, 5); }
TEST(Training, UnevenEvaluationIsTold) { check_training_law(uneven_evaluation_is_told, 5); }
TEST(Training, GradientsAreOfAllTheirRanks) {
  check_training_law(gradients_are_of_all_their_ranks, 5);
}
TEST(Training, MicroBatchesAreNothing) { check_training_law(micro_batches_are_nothing, 5); }
TEST(Training, SplitsAreTheUnsplit) { check_training_law(splits_are_the_unsplit, 5); }
TEST(Exchange, HasAnInverse) { check_training_law(an_exchange_has_an_inverse, 1); }
TEST(Files, DoNotKnowSequences) { check_training_law(files_do_not_know_sequences, 5); }
TEST(Files, ADeathLeavesOldOrNew) { check_training_law(a_death_leaves_old_or_new, 3); }
TEST(Pairs, SampledTopologiesArePlanned) { check_training_law(every_topology_is_planned, 1); }

// RapidCheck's state machine, whose state is the run on one rank.
TEST(Lifecycle, IsOneRun) {
  const auto body = [] {
    const LifeCase value =
        draw_life(drawn_by_rapidcheck, {.topologies = sim::topologies_up_to(8), .steps = 8},
                  parse_faults("all"));
    return run_life(value).reason;
  };
  check_body(body, 10);
}

// The mutants of lives: each is noticed by one of some seeded lives, which hold without it.
class LifeMutants : public testing::TestWithParam<LifeMutant> {};

TEST_P(LifeMutants, IsKilled) {
  const CaseLimits limits{.topologies = sim::topologies_up_to(4), .steps = 8};
  expect_killed(0, 200, [&](uint64_t number, bool mutated) {
    const LifeCase value = seeded_life(11, number, limits, parse_faults("death"));
    return run_life(value, mutated ? GetParam() : LifeMutant::kNone).reason;
  });
}

// The sweep strikes with each kind of fault, and every life holds.
TEST(Lifecycle, EveryFaultStrikes) {
  const CaseLimits limits{
      .topologies = {{.data = 2}, {.pipeline = 2}, {.data = 2, .pipeline = 2}, {.sequence = 2}},
      .steps = 8};
  const std::pair<const char*, int64_t LifeResult::*> kinds[] = {
      {"death", &LifeResult::deaths},    {"disk", &LifeResult::disk_faults},
      {"drop", &LifeResult::drops},      {"slow", &LifeResult::slow_ranks},
      {"late", &LifeResult::late_calls}, {"duplicate", &LifeResult::duplicates},
      {"read", &LifeResult::read_errors}};
  for (const auto& [word, counter] : kinds) {
    int64_t struck = 0;
    uint64_t number = 0;
    for (; struck < 2 && number < 300; ++number) {
      const LifeCase value = seeded_life(5, number, limits, parse_faults(word));
      const LifeResult result = run_life(value);
      ASSERT_EQ(result.reason, "") << word << " " << number << "\n" << text_of(value);
      struck += result.*counter;
    }
    EXPECT_GE(struck, 2) << word;
    std::cout << word << ": struck in " << number << " lives\n";
  }
}

// A bit that is turned over on the way: no rank can know, the comparison with one rank must.
TEST(Lifecycle, ACorruptMessageIsNoticed) {
  const CaseLimits limits{.topologies = sim::topologies_up_to(8), .steps = 8};
  expect_killed(0, 100, [&](uint64_t number, bool mutated) {
    LifeCase value = seeded_life(11, number, limits, parse_faults("corrupt"));
    if (!mutated) {
      std::erase_if(value.commands, [](const LifeCommand& command) {
        return command.kind == LifeCommand::Kind::kFault;
      });
    }
    return run_life(value).reason;
  });
}

INSTANTIATE_TEST_SUITE_P(All, LifeMutants,
                         testing::Values(LifeMutant::kStaleSurvivor, LifeMutant::kColdMoments,
                                         LifeMutant::kLostPointer, LifeMutant::kEqualLots,
                                         LifeMutant::kForeignLot),
                         [](const auto& info) { return name(info.param); });

struct Duel {
  TrainingMutant mutant = TrainingMutant::kNone;
  TrainingLaw law = nullptr;
};

void PrintTo(const Duel& duel, std::ostream* out) { *out << name(duel.mutant); }

const Duel kDuels[] = {
    {TrainingMutant::kRankOrderSum, sums_do_not_know_owners},
    {TrainingMutant::kAbsentIsZero, sums_do_not_know_owners},
    {TrainingMutant::kForgottenRank, groups_are_bijections},
    {TrainingMutant::kSampleTwice, each_sample_is_consumed_once},
    {TrainingMutant::kShiftedPosition, slices_have_the_samples_labels},
    {TrainingMutant::kNeighbourHeads, heads_are_shared_out},
    {TrainingMutant::kLostToken, ulysses_is_attention},
    {TrainingMutant::kUnsummedGroup, ulysses_is_attention},
    {TrainingMutant::kMeanOfMeans, loss_does_not_know_ranks},
    {TrainingMutant::kDroppedTail, stages_are_one},
    {TrainingMutant::kFirstShardNorm, norms_count_each_element_once},
    {TrainingMutant::kStaleMoments, a_resumed_run_is_one_run},
    {TrainingMutant::kStaleCounter, a_resumed_run_is_one_run},
    {TrainingMutant::kOtherSeed, the_seed_is_the_run},
    {TrainingMutant::kEvalMovesData, evaluation_changes_nothing},
    {TrainingMutant::kEvalGathers, evaluation_changes_nothing},
    {TrainingMutant::kQuietedNan, an_exchange_has_an_inverse},
    {TrainingMutant::kReversedPeers, an_exchange_has_an_inverse},
    {TrainingMutant::kSmallGroup, gradients_are_of_all_their_ranks},
    {TrainingMutant::kSummedMicros, micro_batches_are_nothing},
    {TrainingMutant::kFrozenShard, splits_are_the_unsplit},
    {TrainingMutant::kEqualLots, uneven_evaluation_is_told},
    {TrainingMutant::kNoLot, uneven_evaluation_is_told},
    {TrainingMutant::kDegreeInFiles, files_do_not_know_sequences},
    {TrainingMutant::kEarlyPointer, a_death_leaves_old_or_new},
    {TrainingMutant::kSkewedPlan, every_topology_is_planned},
};

std::string outcome(const Duel& duel, uint64_t seed, TrainingMutant mutant) {
  Random random(seed);
  const Draw draw = [&](int64_t low, int64_t high) { return random.between(low, high); };
  try {
    return duel.law(draw, mutant);
  } catch (const std::exception& failure) {
    return failure.what();
  }
}

class TrainingMutants : public testing::TestWithParam<Duel> {};

TEST_P(TrainingMutants, IsKilled) {
  const Duel& duel = GetParam();
  expect_killed(1, 200, [&](uint64_t seed, bool mutated) {
    return outcome(duel, seed, mutated ? duel.mutant : TrainingMutant::kNone);
  });
}

INSTANTIATE_TEST_SUITE_P(All, TrainingMutants, testing::ValuesIn(kDuels),
                         [](const auto& info) { return name(info.param.mutant); });

}  // namespace
}  // namespace isoshard::properties
