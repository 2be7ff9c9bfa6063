// Data-parallel ranks alone: partitions of ZeRO, powers of two and not.
#include "sim/topologies/family.h"

namespace isoshard::sim {

std::vector<NamedTopology> dense_topologies() {
  return named("dense", {
                            {.data = 1},
                            {.data = 2},
                            {.data = 3},
                            {.data = 4},
                            {.data = 8},
                        });
}

}  // namespace isoshard::sim
