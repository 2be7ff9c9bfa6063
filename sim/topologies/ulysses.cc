// Sequence-parallel ranks: fewer, as many and more than key-value heads, and uneven tokens.
#include "sim/topologies/family.h"

namespace isoshard::sim {

std::vector<NamedTopology> ulysses_topologies() {
  return named("ulysses", {
                              {.data = 1, .sequence = 2},
                              {.data = 2, .sequence = 2},
                              {.data = 2, .sequence = 4},
                              {.data = 1, .sequence = 3},
                              {.data = 1, .sequence = 8},
                          });
}

}  // namespace isoshard::sim
