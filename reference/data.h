// What is trained on: tokens as a function of (seed, sample, position), and which rank has which
// sample of a step's batch. Samples are counted over the whole run, so the order of the data
// depends on no topology; a resumed run goes on at the recorded position.
//
// Under sequence parallelism the groups of sp ranks take samples, and each rank its slice of the
// positions: the same as UlyssesSPDataLoaderAdapter makes of P loaders
// (deepspeed/runtime/sequence_parallel/ulysses_sp.py), where micro step i of group n has sample
// n·P + i.
#pragma once

#include <cstdint>
#include <vector>

#include "core/canonical_sum.h"
#include "core/topology.h"
#include "reference/model.h"

namespace isoshard::reference {

constexpr int64_t kIgnored = -100;  // a label without loss

struct DataConfig {
  uint64_t seed = 1;
  int64_t sequence_length = 8;
  int64_t batch = 4;        // samples a step, all ranks together
  int64_t micro_batch = 1;  // samples a rank takes at once
  bool strided = false;     // rank n has samples n, n + dp, …; otherwise a run of them
  bool packed = false;      // several documents in a sample; positions begin again at each
  int masked = 8;           // one label in so many is ignored; whole samples too; 0: none
};

// `sample` counts from the beginning of the run.
int64_t token_of(const DataConfig& data, int64_t vocabulary, int64_t sample, int64_t position);
// The next token, kIgnored at the end of a document and where it is masked.
int64_t label_of(const DataConfig& data, int64_t vocabulary, int64_t sample, int64_t position);
// Position in its document.
int64_t position_of(const DataConfig& data, int64_t sample, int64_t position);

// A step's samples, as numbers within the batch, by data-parallel rank and micro step. All ranks
// have the same number of micro steps; the last ones may be empty.
using BatchPlan = std::vector<std::vector<std::vector<int64_t>>>;
BatchPlan plan_batch(const DataConfig& data, int data_ranks);

// The positions that a sequence-parallel rank has of every sample: the remainder goes to the first.
Span positions_of(const DataConfig& data, int sequence_ranks, int rank);

// Leaves of a sum over tokens (core/canonical_sum.h) that a member owns, sorted. The last slice of
// a sample owns what would come behind it too, so that a whole sample is one node.
std::vector<LeafRange> token_leaves(const DataConfig& data, const std::vector<int64_t>& samples,
                                    Span positions);

}  // namespace isoshard::reference
