// Mutants: mistakes that a resharder could make, switched on at run time outside production code.
// Each is applied between blueprint and executor, or to what a law looks at; a law that does not
// notice its mutant proves nothing. docs/PROPERTIES.md says which law kills which.
#pragma once

#include <string>
#include <vector>

#include "checkpoint/blueprint.h"
#include "checkpoint/sharded_state.h"
#include "core/layout.h"
#include "properties/model.h"
#include "reshard/digest.h"

namespace isoshard::properties {

enum class Mutant {
  kNone,
  kShiftedRun,         // a run is read one element late
  kAlphabeticalRanks,  // rank 10 before rank 2
  kKeptPadding,        // the source's padding goes along
  kDroppedParameter,   // one parameter's master is left out
  kUnpermutedGroups,   // round_robin_gradients is forgotten
  kFloorSlots,         // stage-3 slots of ⌊n / dp⌋
  kSwappedStates,      // exp_avg is exp_avg_sq
  kRoundedMaster,      // the master is taken from the module's low-precision copy
  kBelievedUniversal,  // DeepSpeed's own round-robin defect
  kTruncatedWeights,   // fp32 weights from the module instead of the masters
  kMisnamedSlots,      // stage 0: two slots of the optimizer exchange names
  kForgottenRank,      // the last rank is left out
  kExchangedRanks,     // ranks 0 and 1 hold each other's partitions
  kFileDigest,         // the digest is over files
  kPlacelessDigest,    // the digest ignores where in a leaf a byte stands
  kMergedSections,     // one digest for all sections
  kUncheckedRecords,   // the digest does not compare a record with its CRC
  kListedRanks,        // rank = position in the listing
  kLongFragment,       // a fragment reaches one element into the next rank
  kLostFragment,       // the last fragment is left out
  kCutHeads,           // tensor-parallel widths that do not know of heads
  kCeilWidths,         // tensor-parallel widths of torch.chunk
  kColumnForRow,       // a square row-parallel tensor is cut along its first axis
  kSwappedShards,      // tensor-parallel ranks 0 and 1 hold each other's shards
  kShiftedStage,       // the second pipeline stage begins a layer early
  kTransposedRanks,    // mp ranks count tensor-parallel ranks first, then pipeline stages
  kStaleLayers,        // a layer's file holds another tensor-parallel rank's part
  kSwappedExperts,     // two experts exchange their moments
  kSwappedStacks,      // AutoEP's w1 and w3 exchange their moments
  kDoubledExpert,      // an expert's weights stand for another's too
  kKeptGroups,         // groups of experts stay those of the source's degree
};

std::string name(Mutant mutant);

// The source as the mutant sees it, before blueprints are made for a job of that many ranks.
checkpoint::ShardedState mutate_source(Mutant mutant, const checkpoint::ShardedState& source,
                                       const Job& job);

// What a reader would have made of stage 0 that gives two parameters each other's state.
void mutate_names(Mutant mutant, checkpoint::ShardedState* state);

// The blueprints of a target, before they are planned.
void mutate_files(Mutant mutant, const checkpoint::ShardedState& source, const Job& job,
                  std::vector<checkpoint::FileBlueprint>* files);

// The digest as the mutant computes it.
reshard::Digest mutate_digest(Mutant mutant, const checkpoint::ShardedState& state,
                              reshard::Digest digest);

// The digest of kUncheckedRecords: leaves as they are read.
reshard::Digest digest_without_checks(const checkpoint::ShardedState& state);

std::vector<RankFragment> mutate_fragments(Mutant mutant, std::vector<RankFragment> fragments);

}  // namespace isoshard::properties
