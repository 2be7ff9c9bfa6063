// The laws of simulated training and of what it is built on. A law draws its case number by number
// and returns "" if it holds; docs/PROPERTIES.md lists them with tier and mutant.
#pragma once

#include <string>

#include "properties/simulation_case.h"

namespace isoshard::properties {

// Mistakes of a training framework, switched on at run time in the law's own world.
enum class TrainingMutant {
  kNone,
  kRankOrderSum,     // a sum adds the owners' totals in rank order
  kAbsentIsZero,     // a leaf that does not exist is +0
  kNeighbourHeads,   // Ulysses: a rank computes the next rank's heads
  kLostToken,        // Ulysses: the first token of a slice stays zero on the way back
  kUnsummedGroup,    // GQA: the gradient of a key-value head is that of its first query head
  kShiftedPosition,  // labels are shifted within a slice, not within the sample
  kSampleTwice,      // the first sample of a data-parallel rank is another rank's too
  kForgottenRank,    // the last member of a group is left out of it
  kMeanOfMeans,      // the loss is the mean of the ranks' means
  kFirstShardNorm,   // the norm is that of tensor-parallel rank 0's shards
  kStaleMoments,     // a reshard forgets the second moment
  kStaleCounter,     // a resume begins the data again
  kDroppedTail,      // the last element of a rank's buffer is not stepped
  kEvalMovesData,    // an evaluation takes samples from the training data's order
  kEvalGathers,      // an evaluation in bypass gathers everybody's loss
  kOtherSeed,        // the second run has another order of events
  kQuietedNan,       // a value on its way goes through arithmetic
  kReversedPeers,    // what comes back is taken from the ranks in reverse
  kSmallGroup,       // gradients are reduced over the data-parallel ranks alone
  kSummedMicros,     // gradients of micro batches are summed, not averaged
  kFrozenShard,      // the last rank's shard is not stepped
  kDegreeInFiles,    // the files say how many sequence-parallel ranks there were
  kEarlyPointer,     // `latest` is moved before the files are written
  kEqualLots,        // every rank evaluates as many samples, though told otherwise
  kNoLot,            // one rank does not evaluate at all, so that the others wait
  kSkewedPlan,       // a plan reads one element early
};

std::string name(TrainingMutant mutant);

using TrainingLaw = std::string (*)(const Draw& draw, TrainingMutant mutant);

// Core.
std::string sums_do_not_know_owners(const Draw& draw, TrainingMutant mutant);
std::string groups_are_bijections(const Draw& draw, TrainingMutant mutant);
// Data.
std::string each_sample_is_consumed_once(const Draw& draw, TrainingMutant mutant);
std::string slices_have_the_samples_labels(const Draw& draw, TrainingMutant mutant);
// Ulysses.
std::string heads_are_shared_out(const Draw& draw, TrainingMutant mutant);
std::string ulysses_is_attention(const Draw& draw, TrainingMutant mutant);
// Training.
std::string loss_does_not_know_ranks(const Draw& draw, TrainingMutant mutant);
std::string stages_are_one(const Draw& draw, TrainingMutant mutant);
std::string norms_count_each_element_once(const Draw& draw, TrainingMutant mutant);
std::string a_resumed_run_is_one_run(const Draw& draw, TrainingMutant mutant);
std::string the_seed_is_the_run(const Draw& draw, TrainingMutant mutant);
std::string evaluation_changes_nothing(const Draw& draw, TrainingMutant mutant);
// Exchanges and groups.
std::string an_exchange_has_an_inverse(const Draw& draw, TrainingMutant mutant);
std::string gradients_are_of_all_their_ranks(const Draw& draw, TrainingMutant mutant);
std::string micro_batches_are_nothing(const Draw& draw, TrainingMutant mutant);
std::string splits_are_the_unsplit(const Draw& draw, TrainingMutant mutant);
std::string uneven_evaluation_is_told(const Draw& draw, TrainingMutant mutant);
// The engine's files.
std::string files_do_not_know_sequences(const Draw& draw, TrainingMutant mutant);
std::string a_death_leaves_old_or_new(const Draw& draw, TrainingMutant mutant);
// Plans between any two of all topologies of up to 8 ranks and stages.
std::string every_topology_is_planned(const Draw& draw, TrainingMutant mutant);

}  // namespace isoshard::properties
