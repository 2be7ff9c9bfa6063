// Two checkpoints of any stage, topology and format compared section by section and name by name.
// Leaves are compared by their CRCs; only those that differ are read a second time, to count and
// show their differences. Link 9 of the tensor's journey: compared, bit by bit.
//
// Not compared here: copies inside one side (verify does that), file layout, padding.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "reshard/executor.h"

namespace isoshard::reshard {

struct DiffOptions {
  StreamOptions stream;  // its `digest` is not used
  int64_t ulp = 0;       // floating values at most this many representable values apart are equal
  std::string only;      // regular expression on names; not empty: hyper is left out
};

struct FirstDifference {
  Shape index;
  std::string a, b;            // values as text
  std::string a_bits, b_bits;  // hexadecimal; empty where there are no bits
};

// What differs under one name and state.
struct Difference {
  std::string section;    // "weights", "exp_avg", …, "steps", "buffers", "hyper"
  std::string name;       // parameter, buffer or alias; of hyper: the path inside the JSON
  std::string state;      // "weight", "exp_avg", "step", "buffer", "alias", "hyper"
  int64_t different = 0;  // elements
  int64_t total = 0;
  std::optional<FirstDifference> first;
  std::string explanation;  // never empty: also why there is nothing to count
  bool explained = false;   // the explanation says what B's values are in terms of A's
};

struct SectionOutcome {
  enum class Verdict { kEqual, kCast, kDifferent, kAbsent };
  std::string section;
  Verdict verdict = Verdict::kEqual;
  std::string note;       // kAbsent: the reason; otherwise what else is to be said, or empty
  int64_t names = 0;      // compared
  int64_t different = 0;  // of those
};

const char* name(SectionOutcome::Verdict verdict);  // "equal", "cast", "different", "absent"

struct DiffReport {
  std::vector<SectionOutcome> sections;
  std::vector<Difference> differences;  // first one first: by section, then in the model's order
  std::string reason;                   // one reason for all of them, proven; or empty
  std::string right;                    // which side the model's own weights speak for; or empty

  bool equal() const { return differences.empty(); }
};

DiffReport diff(Storage& storage, const checkpoint::ShardedState& a,
                const checkpoint::ShardedState& b, const DiffOptions& options);

}  // namespace isoshard::reshard
