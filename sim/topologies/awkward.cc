// Primes, more ranks than samples or tokens, ranks without heads, and many ranks.
#include "sim/topologies/family.h"

namespace isoshard::sim {

std::vector<NamedTopology> awkward_topologies() {
  return named("awkward", {
                              {.data = 5},
                              {.data = 7},
                              {.data = 1, .sequence = 5},
                              {.data = 1, .sequence = 7},
                              {.data = 3, .tensor = 3},
                              {.data = 13},
                              {.data = 5, .sequence = 3},
                              {.data = 16, .sequence = 4},
                          });
}

}  // namespace isoshard::sim
