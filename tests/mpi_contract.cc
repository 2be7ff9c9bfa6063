// mpi_contract [WORD]: the contract of communicators (communicator_contract.h) over the ranks of
// one MPI job, to be started by mpirun. Words: `uncompared`, without comparing calls; `stuck`,
// where rank 1 does not come to a barrier; `dead`, where it ends by a signal. Prints what was held
// to and ends with 0, or an Error and 1.
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <map>
#include <thread>

#include "core/error.h"
#include "reshard/mpi_world.h"
#include "tests/communicator_contract.h"

namespace isoshard::tests {
namespace {

using reshard::MpiWorld;

int open_files() {
  int count = 0;
  for (int number = 0; number < 1024; ++number) {
    char path[64];
    std::snprintf(path, sizeof(path), "/proc/self/fd/%d", number);
    count += access(path, F_OK) == 0;
  }
  return count;
}

void run(MpiWorld& world, const Topology& topology, const ContractCase& each) {
  std::map<GroupKind, std::unique_ptr<Communicator>> groups;
  ContractRank rank{
      .topology = topology, .world = world.world(), .group = [&](GroupKind kind) -> Communicator& {
        std::unique_ptr<Communicator>& place = groups[kind];
        if (!place) place = world.group(topology, kind);
        return *place;
      }};
  each.body(rank);
}

bool is_refused(MpiWorld& world, const ContractCase& each) {
  try {
    run(world, {.data = world.size()}, each);
  } catch (const Error& error) {
    return error.info().code == ErrorCode::kMismatch;
  }
  return false;
}

int hold_to_all(MpiWorld& world, bool compared) {
  int held = 0;
  const std::vector<ContractCase> cases = contract_cases();
  for (const Topology& topology : contract_topologies(world.size())) {
    if (topology.world() != world.size()) continue;
    for (const ContractCase& each : cases) {
      run(world, topology, each);
      ++held;
    }
  }
  const int files = open_files();
  for (int round = 0; round < 50; ++round) run(world, {.data = world.size()}, cases.back());
  if (open_files() != files) throw Error(ErrorCode::kMismatch, "File handles were leaked.");
  for (const ContractCase& each : compared ? disagreements() : std::vector<ContractCase>{}) {
    const bool in_pairs = each.name.ends_with("_of_a_message");
    if (world.size() < 2 || (in_pairs && world.size() > 2)) continue;
    if (!is_refused(world, each))
      throw Error(ErrorCode::kMismatch, "Nobody has refused: " + each.name);
    ++held;
    world.world().barrier();
  }
  return held;
}

int run_all(const std::string& word) {
  const bool fails = word == "stuck" || word == "dead";
  reshard::MpiOptions options{.compare_calls = word != "uncompared"};
  if (fails) options.timeout = std::chrono::seconds(2);
  MpiWorld world(options);
  try {
    if (word == "stuck" && world.rank() == 1) std::this_thread::sleep_for(std::chrono::seconds(60));
    if (word == "dead" && world.rank() == 1) raise(SIGKILL);
    if (fails) world.world().barrier();
    const int held = hold_to_all(world, options.compare_calls);
    if (world.rank() == 0)
      std::printf("contract of communicators: %d cases on %d ranks\n", held, world.size());
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "rank %d: %s\n", world.rank(), error.what());
    std::fflush(stderr);
    world.abort(1);
  }
}

}  // namespace
}  // namespace isoshard::tests

int main(int count, char** words) { return isoshard::tests::run_all(count > 1 ? words[1] : ""); }
