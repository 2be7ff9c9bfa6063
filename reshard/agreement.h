// Whether a source agrees with itself (copies.h), judged from the CRCs of a pass that is made
// anyway: the master's CRC after the cast against that of the copy. Only what differs there is read
// once more, element by element.
#pragma once

#include <string>
#include <vector>

#include "reshard/copies.h"
#include "reshard/executor.h"

namespace isoshard::reshard {

// One paragraph for each kind of disagreement, its first lines the first tensors.
std::vector<std::string> tell_differences(const checkpoint::ShardedState& state,
                                          const CopyReport& report,
                                          const std::vector<std::string>& orphans);

class Agreement {
 public:
  explicit Agreement(const checkpoint::ShardedState& state);

  // Adds what the pass must sum up on the way.
  void ask(StreamOptions* options);

  // After that pass: paragraphs as above, none where all agree.
  std::vector<std::string> judge(const StreamOptions& options, const StreamResult& result) const;

 private:
  const checkpoint::ShardedState& state_;
  std::vector<std::string> orphans_;
  std::vector<CopyPair> pairs_;
  std::vector<int> casts_;  // by pair: number in StreamOptions::casts; −1: none is needed
};

}  // namespace isoshard::reshard
