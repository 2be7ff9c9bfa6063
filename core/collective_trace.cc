// See collective_trace.h.
#include "core/collective_trace.h"

#include <algorithm>

#include "core/random.h"

namespace isoshard {

int CollectiveTrace::group(const std::string& name) {
  const auto found = std::find(groups_.begin(), groups_.end(), name);
  if (found != groups_.end()) return static_cast<int>(found - groups_.begin());
  groups_.push_back(name);
  return static_cast<int>(groups_.size()) - 1;
}

uint64_t CollectiveTrace::hash() const {
  uint64_t word = mix(events_.size());
  for (const TraceEvent& e : events_) {
    word = keyed_random(word, {static_cast<uint64_t>(e.rank), static_cast<uint64_t>(e.verb),
                               static_cast<uint64_t>(e.group), static_cast<uint64_t>(e.sequence),
                               static_cast<uint64_t>(e.dtype), static_cast<uint64_t>(e.count),
                               static_cast<uint64_t>(e.peer + 1), static_cast<uint64_t>(e.begin),
                               static_cast<uint64_t>(e.end)});
  }
  return word;
}

std::string CollectiveTrace::site_text(const CallSite& site) {
  const std::string file = site.file_name();
  const size_t slash = file.rfind('/');
  return (slash == std::string::npos ? file : file.substr(slash + 1)) + ":" +
         std::to_string(site.line());
}

}  // namespace isoshard
