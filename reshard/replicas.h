// What a checkpoint stores more than once, copy by copy: which copies are equal, and which one is
// alone. Link 8 of the tensor's journey: judged before it is loaded.
//
//   tp rank 0  3f80 …  ┐
//   tp rank 1  3f80 …  ┘ two alike: most hold this      tp rank 2  bf80 …  alone
//
// Not verified: that most copies are right, nor that two copies of two which differ are not both
// wrong.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "reshard/copies.h"
#include "reshard/executor.h"

namespace isoshard::reshard {

enum class ReplicaKind {
  kTensor,  // what several ranks, stages or layers hold alike: equal bit for bit
  kBuffer,  // stage 3: a buffer in every rank's model file
  kMaster,  // the master, rounded, and the model's copy
  kRestated,
  kTied,
  kValue,        // a plain value that the file of every rank repeats: steps, schedule, counters
  kClientState,  // what the training script gave to save_checkpoint, on every rank
};
constexpr int kReplicaKinds = 7;
const char* name(ReplicaKind kind);  // "tensors of ranks"

struct ReplicaCopy {
  std::string file;   // inside the checkpoint's folder; of several, the first
  std::string place;  // "dp rank 1, mp rank 0, tp rank 1"
};

// One copy, against one of those that most agree on, or that stand first.
struct CopyContrast {
  int copy = -1;          // numbers in ReplicaDifference::copies
  int against = -1;       // likewise
  std::string file = {};  // where its first differing element or value lies
  std::string entry = {};
  int64_t element = -1;       // its number; −1 for a value
  std::string index = {};     // the same by dimension, "[2, 0]"; empty for a value
  int64_t offset_bytes = -1;  // of it in the file; −1: a value of a pickle
  std::string found = {}, expected = {};
  int64_t differing = 0;  // elements
  int64_t total = 0;
  std::string how = {};  // "the sign of zero alone", "one bit", "at most 3 ulp"
};

struct ReplicaDifference {
  ReplicaKind kind = ReplicaKind::kTensor;
  std::string name = {};   // of the tensor, or path of the value
  std::string state = {};  // "exp_avg"; empty where there is none
  std::vector<ReplicaCopy> copies = {};
  std::vector<std::vector<int>> groups = {};  // copies that are equal, the largest group first
  bool majority = false;                      // the first group is larger than every other
  std::vector<CopyContrast> contrasts = {};   // of each further group its first copy
  std::string evidence = {};                  // what else tells who is right; empty: nothing
  bool judged = true;                         // false: ranks may hold values of their own
};

struct ReplicaCount {
  int64_t sets = 0;  // things that are stored more than once
  int64_t copies = 0;
  int64_t elements = 0;
  int64_t differing = 0;  // sets
};

struct ReplicaReport {
  std::array<ReplicaCount, kReplicaKinds> counts;
  std::vector<ReplicaDifference> differences;
  std::vector<std::string> uncompared;  // what, and why
  ReplicaCount& of(ReplicaKind kind) { return counts[static_cast<size_t>(kind)]; }
};

// Puts equal contents together: groups, majority. `contents` by copy; the first copies come first.
void vote(const std::vector<std::string>& contents, ReplicaDifference* difference);

// Tensors of one state that must be equal bit for bit.
struct TensorSet {
  ReplicaKind kind = ReplicaKind::kTensor;
  std::vector<int> leaves;
};

// Sets of the state's replicas, whatever pairs name them: those of one dtype.
std::vector<TensorSet> replica_sets(const checkpoint::ShardedState& state);

// Whether replica_sets() has both of a pair, so that no difference of theirs goes untold.
bool in_a_set(const checkpoint::ShardedState& state, const CopyPair& pair);

// Replicas whose dtypes differ: told as differences, whatever their values.
void compare_dtypes(const checkpoint::ShardedState& state, ReplicaReport* report);

// CRC of a leaf's bytes, read in steps of 1 MiB.
LeafCrc crc_of_leaf(const checkpoint::ShardedState& state, const checkpoint::Leaf& leaf);

// Compares the sets: by the CRCs of a pass that has been made (`known`, by leaf), which are taken
// here where they are missing; only what differs is read again.
void compare_sets(const checkpoint::ShardedState& state, const std::vector<TensorSet>& sets,
                  const std::vector<LeafCrc>& known, int workers, ReplicaReport* report);

// The pairs that copies.h has compared, in the same words; of replicas nothing, which are sets.
void add_pairs(const checkpoint::ShardedState& state, const CopyReport& pairs, int workers,
               ReplicaReport* report);

// A paragraph for each kind that differs and is judged; notices for those that are not. Pairs are
// told by agreement.h; here only what else speaks for or against them.
struct ReplicaTexts {
  std::vector<std::string> findings, notices;
};
ReplicaTexts tell_replicas(const ReplicaReport& report);

// One difference in one paragraph: copies, who is alone, how it differs, the evidence.
std::string describe(const ReplicaDifference& difference);

}  // namespace isoshard::reshard
