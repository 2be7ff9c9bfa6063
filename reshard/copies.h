// Whatever a checkpoint stores twice must agree with itself: a master with the model's own copy,
// a restated tensor with its original, a tied name with its target.
#pragma once

#include <string>
#include <vector>

#include "checkpoint/sharded_state.h"

namespace isoshard::reshard {

// `copy` must be `original` cast to the copy's dtype; both are leaves.
struct CopyPair {
  enum class Kind {
    kMaster,    // the master of a parameter, and the copy that the model computes with
    kRestated,  // a tensor of the model, and what a universal folder says of it in fp32
    kTied,      // the model's copy of a parameter, and that of its second name
    kReplica,   // what two ranks of one axis hold alike
  };
  Kind kind = Kind::kMaster;
  std::string name;  // of the copy
  int original = -1;
  int copy = -1;
};

// All pairs that have bytes of their own. Second names whose target is not there go to `orphans`.
std::vector<CopyPair> copy_pairs(const checkpoint::ShardedState& state,
                                 std::vector<std::string>* orphans);

struct CopyDifference {
  CopyPair pair;
  int64_t differing = 0;  // elements
  int64_t total = 0;
  std::string index;     // of the first one, "[2, 0]"
  std::string original;  // bits and value there
  std::string expected;  // the original's cast
  std::string found;     // the copy
};

struct CopyReport {
  int64_t pairs[4] = {};  // compared, by kind
  int64_t elements = 0;
  std::vector<CopyDifference> differences;  // in the order of the pairs
  std::vector<std::string> uncompared;      // why a pair could not be compared
};

// Reads both sides in steps of 1 MiB. A NaN agrees with every NaN, because processors cast them
// differently. Does not check CRCs, nor that the originals are right.
CopyReport compare_copies(const checkpoint::ShardedState& state, const std::vector<CopyPair>& pairs,
                          int workers);

}  // namespace isoshard::reshard
