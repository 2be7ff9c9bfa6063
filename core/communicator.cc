// Names of the verbs.
#include "core/communicator.h"

namespace isoshard {

const char* name(Verb verb) {
  constexpr const char* kNames[] = {"all_reduce", "reduce_scatter", "all_gather", "all_to_all",
                                    "broadcast",  "send",           "receive",    "barrier"};
  return kNames[static_cast<size_t>(verb)];
}

}  // namespace isoshard
