// See cluster.h.
#include "sim/cluster.h"

#include <algorithm>
#include <map>

#include "core/check.h"
#include "core/error.h"
#include "sim/simulated_communicator.h"
#include "sim/simulated_storage.h"

namespace isoshard::sim {

struct Cluster::State {
  State(const ClusterOptions& options, int ranks)
      : network(options.seed, options.stack_bytes, ranks) {}
  Interconnect network;
  std::map<std::pair<std::string, std::vector<int>>, std::shared_ptr<GroupBoard>> boards;
};

const Topology& Rank::topology() const { return cluster_->topology(); }

Communicator& Rank::group(GroupKind kind) {
  const std::string key = isoshard::name(kind);
  for (const auto& [known, group] : groups_) {
    if (known == key) return *group;
  }
  const std::vector<int> ranks = group_of(topology(), kind, number_);
  groups_.emplace_back(
      key, std::make_unique<SimulatedCommunicator>(cluster_->board(key, ranks), number_));
  return *groups_.back().second;
}

Storage& Rank::storage(Storage& disk) {
  storages_.push_back(std::make_unique<SimulatedStorage>(disk, cluster_->state_->network, number_));
  return *storages_.back();
}

int64_t Rank::operations() const {
  return cluster_->state_->network.operations[static_cast<size_t>(number_)];
}

int64_t Rank::reads() const {
  return cluster_->state_->network.reads[static_cast<size_t>(number_)];
}

Cluster::Cluster(const Topology& topology, ClusterOptions options)
    : topology_(topology), options_(std::move(options)) {
  check_topology(topology_);
}

Cluster::~Cluster() = default;

std::shared_ptr<GroupBoard> Cluster::board(const std::string& name, const std::vector<int>& ranks) {
  std::shared_ptr<GroupBoard>& board = state_->boards[{name, ranks}];
  if (!board) {
    board = std::make_shared<GroupBoard>(&state_->network, name + " " + listed(ranks, 16), ranks);
  }
  return board;
}

void Cluster::report_stuck() {
  const Interconnect& network = state_->network;
  std::string who;
  int shown = 0, waiting = 0;
  for (size_t rank = 0; rank < network.waits.size(); ++rank) {
    const Interconnect::Wait& wait = network.waits[rank];
    if (wait.board == nullptr) continue;
    ++waiting;
    if (++shown > 8) continue;
    who += (who.empty() ? "" : "; ") +
           wait.board->waiting(static_cast<int>(rank), *wait.call, wait.sequence);
  }
  if (waiting > shown) who += "; and " + std::to_string(waiting - shown) + " more";
  std::string others;
  for (size_t rank = 0; rank < network.waits.size(); ++rank) {
    if (network.waits[rank].board != nullptr || network.is_dead(static_cast<int>(rank))) continue;
    others += (others.empty() ? "" : ",") + std::to_string(rank);
  }
  const bool died = !network.dead.empty();
  throw Error(ErrorInfo{
      .code = died ? ErrorCode::kInterrupted : ErrorCode::kMismatch,
      .what = died ? "A rank died, and others wait for it." : "Deadlock: no rank can go on.",
      .entry = died ? "rank " + listed(network.dead, 8) + " died" : "",
      .expected = "every rank of a group calls the same collectives",
      .found = who + (others.empty() ? "" : "; ended: rank " + others),
      .next = died ? "resume from the last checkpoint that is whole"
                   : "look for a collective behind a condition that not all ranks share"});
}

void Cluster::run(const std::function<void(Rank&)>& body) {
  state_ = std::make_unique<State>(options_, topology_.world());
  Interconnect& network = state_->network;
  network.faults = options_.faults;
  network.trace = &trace_;
  dead_.clear();
  struck_.clear();
  std::vector<std::unique_ptr<Rank>> ranks;
  for (int number = 0; number < topology_.world(); ++number) {
    ranks.emplace_back(new Rank(this, number));
    Rank* const rank = ranks.back().get();
    network.scheduler.spawn([&body, rank] {
      try {
        body(*rank);
      } catch (const RankDied&) {
      }
    });
  }
  const bool ended = network.scheduler.run();
  dead_ = network.dead;
  struck_ = network.struck;
  std::sort(dead_.begin(), dead_.end());
  struct Stop {
    Scheduler& scheduler;
    ~Stop() { scheduler.stop(); }
  } stop{network.scheduler};
  if (!network.scheduler.failed().empty()) {
    const int first = network.scheduler.failed().front();
    try {
      std::rethrow_exception(network.scheduler.failure(first));
    } catch (const Error& error) {
      ErrorInfo info = error.info();
      info.what = "On rank " + std::to_string(first) + ": " + info.what;
      throw Error(info);
    }
  }
  if (!ended) report_stuck();
}

}  // namespace isoshard::sim
