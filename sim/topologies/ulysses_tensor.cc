// Sequence- and tensor-parallel ranks together, which DeepSpeed does not run: in memory only.
#include "sim/topologies/family.h"

namespace isoshard::sim {

std::vector<NamedTopology> ulysses_tensor_topologies() {
  return named("ulysses_tensor", {
                                     {.data = 1, .sequence = 2, .tensor = 2},
                                     {.data = 2, .sequence = 2, .tensor = 2},
                                     {.data = 1, .sequence = 3, .tensor = 2},
                                     {.data = 1, .sequence = 2, .tensor = 4},
                                 });
}

}  // namespace isoshard::sim
