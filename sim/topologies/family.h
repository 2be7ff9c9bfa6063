// What the files of families share.
#pragma once

#include <string>
#include <vector>

#include "sim/topologies/catalog.h"

namespace isoshard::sim {

inline std::vector<NamedTopology> named(const std::string& family,
                                        const std::vector<Topology>& topologies) {
  std::vector<NamedTopology> list;
  for (const Topology& topology : topologies) {
    list.push_back({family + "." + to_string(topology), topology});
  }
  return list;
}

}  // namespace isoshard::sim
