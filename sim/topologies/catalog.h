// Topologies by name. Each family is one file and says what it is there to break.
#pragma once

#include <string>
#include <vector>

#include "core/topology.h"

namespace isoshard::sim {

struct NamedTopology {
  std::string name;  // "ulysses.dp2.sp4"
  Topology topology;
};

std::vector<NamedTopology> dense_topologies();
std::vector<NamedTopology> ulysses_topologies();
std::vector<NamedTopology> ulysses_tensor_topologies();
std::vector<NamedTopology> expert_topologies();
std::vector<NamedTopology> pipeline_topologies();
std::vector<NamedTopology> awkward_topologies();

std::vector<NamedTopology> catalog();

// Every topology of up to `world` ranks that a model with enough heads, layers and experts can
// have.
std::vector<Topology> topologies_up_to(int world);

// "world<=8", the name of a family or of one entry, "dp=2,sp=4"; several with spaces between.
// Throws Error(kUsage) for anything else.
std::vector<Topology> select_topologies(const std::string& text);

}  // namespace isoshard::sim
