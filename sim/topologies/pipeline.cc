// Pipeline stages with everything else: activations by send and receive, tied embeddings on two
// stages.
#include "sim/topologies/family.h"

namespace isoshard::sim {

std::vector<NamedTopology> pipeline_topologies() {
  return named("pipeline", {
                               {.data = 1, .pipeline = 2},
                               {.data = 2, .pipeline = 2},
                               {.data = 1, .tensor = 2, .pipeline = 2},
                               {.data = 1, .sequence = 2, .pipeline = 2},
                               {.data = 2, .expert = 2, .pipeline = 2},
                           });
}

}  // namespace isoshard::sim
