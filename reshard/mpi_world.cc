// See mpi_world.h.
#include "reshard/mpi_world.h"

#include <cstdlib>
#include <numeric>

#include "core/error.h"
#include "reshard/mpi_communicator.h"

namespace isoshard::reshard {

bool MpiWorld::is_launched() { return std::getenv("OMPI_COMM_WORLD_SIZE") != nullptr; }

MpiWorld::MpiWorld(MpiOptions options)
    : transport_(std::make_unique<MpiTransport>(options.timeout)), options_(options) {
  std::vector<int> all(static_cast<size_t>(transport_->size()));
  std::iota(all.begin(), all.end(), 0);
  world_ = group(name(GroupKind::kWorld), all);
}

MpiWorld::~MpiWorld() = default;

Communicator& MpiWorld::world() { return *world_; }

std::unique_ptr<Communicator> MpiWorld::group(const std::string& name,
                                              const std::vector<int>& ranks) {
  return std::make_unique<MpiCommunicator>(*transport_, name, ranks, options_.compare_calls);
}

std::unique_ptr<Communicator> MpiWorld::group(const Topology& topology, GroupKind kind) {
  if (topology.world() != size()) {
    throw Error(
        ErrorInfo{.code = ErrorCode::kUsage,
                  .what = "The topology has another number of ranks than the job.",
                  .expected = std::to_string(topology.world()) + " ranks",
                  .found = std::to_string(size()) + " processes",
                  .next = "start the job by mpirun -n " + std::to_string(topology.world())});
  }
  std::string name = isoshard::name(kind);
  const std::vector<int> ranks = group_of(topology, kind, rank());
  for (size_t i = 0; i < ranks.size(); ++i) name += (i == 0 ? " " : ",") + std::to_string(ranks[i]);
  return group(name, ranks);
}

void MpiWorld::abort(int status) { transport_->abort(status); }

}  // namespace isoshard::reshard
