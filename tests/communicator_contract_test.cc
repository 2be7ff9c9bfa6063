// The contract of communicators, held to by the simulated one. tests/mpi_contract.cc is the same
// for real processes.
#include "tests/communicator_contract.h"

#include <gtest/gtest.h>

#include "core/error.h"
#include "sim/cluster.h"

namespace isoshard::tests {
namespace {

void run(sim::Cluster& cluster, const ContractCase& each) {
  cluster.run([&](sim::Rank& rank) {
    ContractRank contract{
        .topology = cluster.topology(),
        .world = rank.group(GroupKind::kWorld),
        .group = [&](GroupKind kind) -> Communicator& { return rank.group(kind); }};
    each.body(contract);
  });
}

TEST(CommunicatorContract, TheSimulatedOneKeepsIt) {
  for (const Topology& topology : contract_topologies(24)) {
    for (const ContractCase& each : contract_cases()) {
      SCOPED_TRACE(each.name + " at " + to_string(topology));
      for (const uint64_t seed : {1, 2}) {
        sim::Cluster cluster(topology, {.seed = seed});
        EXPECT_NO_THROW(run(cluster, each));
      }
    }
  }
}

TEST(CommunicatorContract, TheSimulatedOneRefusesCallsThatDoNotAgree) {
  for (const int ranks : {2, 3, 5}) {
    for (const ContractCase& each : disagreements()) {
      SCOPED_TRACE(each.name + " of " + std::to_string(ranks) + " ranks");
      sim::Cluster cluster({.data = ranks});
      try {
        run(cluster, each);
        ADD_FAILURE() << "nobody has refused it";
      } catch (const Error& error) {
        EXPECT_EQ(error.info().code, ErrorCode::kMismatch);
      }
    }
  }
}

}  // namespace
}  // namespace isoshard::tests
