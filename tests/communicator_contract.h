// What every Communicator must do (core/communicator.h), as cases that any of them is put through:
// each is a body that all ranks of a world run, and throws where what arrives is not what the
// definition says.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "core/communicator.h"
#include "core/process_group.h"

namespace isoshard::tests {

// One rank of a world of `topology`.
struct ContractRank {
  const Topology& topology;
  Communicator& world;
  std::function<Communicator&(GroupKind)> group;
};

struct ContractCase {
  std::string name;
  std::function<void(ContractRank&)> body;
};

// Verbs with every dtype, uneven and zero counts, in place, groups in any order.
std::vector<ContractCase> contract_cases();

// Calls of two ranks that do not agree, for worlds of at least two: each rank must throw
// Error(kMismatch) or, where it only waits for such a rank, some Error.
std::vector<ContractCase> disagreements();

// Topologies that the cases are put through: 1 rank, primes, and several axes.
std::vector<Topology> contract_topologies(int most_ranks);

}  // namespace isoshard::tests
