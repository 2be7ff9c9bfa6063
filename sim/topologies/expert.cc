// Expert-parallel ranks, inside data-, sequence- and (folded) tensor-parallel ones.
#include "sim/topologies/family.h"

namespace isoshard::sim {

std::vector<NamedTopology> expert_topologies() {
  return named("expert", {
                             {.data = 2, .expert = 2},
                             {.data = 4, .expert = 2},
                             {.data = 4, .expert = 4},
                             {.data = 2, .sequence = 2, .expert = 4},
                             {.data = 2, .tensor = 2, .expert = 4},
                         });
}

}  // namespace isoshard::sim
