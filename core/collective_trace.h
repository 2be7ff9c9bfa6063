// What every rank said to every other, in the order in which it came to pass: the record of a run,
// always kept. Link 5 of the tensor's journey.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/communicator.h"

namespace isoshard {

struct TraceEvent {
  int rank = 0;  // in the world
  Verb verb = Verb::kBarrier;
  int group = 0;         // number in CollectiveTrace::groups
  int64_t sequence = 0;  // of the call within the group, as this rank counts
  DType dtype = DType::kFloat32;
  int64_t count = 0;  // elements that this rank hands over, all peers together
  int peer = -1;      // rank of the root, or of the other side of a message; −1: all
  int64_t begin = 0;  // tick at which the rank came
  int64_t end = 0;    // tick at which it could go on
  CallSite site;
};

class CollectiveTrace {
 public:
  // The number of a group, by its printed name.
  int group(const std::string& name);
  void add(const TraceEvent& event) { events_.push_back(event); }

  const std::vector<TraceEvent>& events() const { return events_; }
  const std::vector<std::string>& groups() const { return groups_; }
  // Of all events in order, without their call sites' file names: one value for one run.
  uint64_t hash() const;
  // The part behind the last '/', so that a trace does not depend on where it was compiled.
  static std::string site_text(const CallSite& site);

 private:
  std::vector<TraceEvent> events_;
  std::vector<std::string> groups_;
};

}  // namespace isoshard
