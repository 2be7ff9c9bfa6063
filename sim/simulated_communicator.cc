// See simulated_communicator.h.
#include "sim/simulated_communicator.h"

#include <algorithm>

#include "core/check.h"

namespace isoshard::sim {

SimulatedCommunicator::SimulatedCommunicator(std::shared_ptr<GroupBoard> board, int rank_global)
    : board_(std::move(board)) {
  const std::vector<int>& ranks = board_->ranks();
  const auto found = std::find(ranks.begin(), ranks.end(), rank_global);
  CHECK(found != ranks.end(), "the rank is not in the group");
  member_ = static_cast<int>(found - ranks.begin());
}

void SimulatedCommunicator::all_reduce(Buffer values, Reduction reduction, CallSite site) {
  board_->collective(member_, {.verb = Verb::kAllReduce,
                               .reduction = reduction,
                               .source = {{values.dtype, values.data, values.count}},
                               .target = {values},
                               .site = site});
}

void SimulatedCommunicator::reduce_scatter(std::span<const ConstBuffer> source, Buffer target,
                                           Reduction reduction, CallSite site) {
  CHECK(source.size() == static_cast<size_t>(size()), "one buffer for each member");
  board_->collective(member_, {.verb = Verb::kReduceScatter,
                               .reduction = reduction,
                               .source = {source.begin(), source.end()},
                               .target = {target},
                               .site = site});
}

void SimulatedCommunicator::all_gather(ConstBuffer source, std::span<const Buffer> target,
                                       CallSite site) {
  CHECK(target.size() == static_cast<size_t>(size()), "one buffer for each member");
  board_->collective(member_, {.verb = Verb::kAllGather,
                               .source = {source},
                               .target = {target.begin(), target.end()},
                               .site = site});
}

void SimulatedCommunicator::all_to_all(std::span<const ConstBuffer> source,
                                       std::span<const Buffer> target, CallSite site) {
  CHECK(source.size() == static_cast<size_t>(size()) && target.size() == source.size(),
        "one buffer for each member");
  board_->collective(member_, {.verb = Verb::kAllToAll,
                               .source = {source.begin(), source.end()},
                               .target = {target.begin(), target.end()},
                               .site = site});
}

void SimulatedCommunicator::broadcast(Buffer values, int root, CallSite site) {
  CHECK(root >= 0 && root < size(), "the root is no member of the group");
  board_->collective(member_, {.verb = Verb::kBroadcast,
                               .peer = root,
                               .source = {{values.dtype, values.data, values.count}},
                               .target = {values},
                               .site = site});
}

void SimulatedCommunicator::send(ConstBuffer source, int to, CallSite site) {
  CHECK(to >= 0 && to < size(), "the receiver is no member of the group");
  CHECK(to != member_, "a rank sends to itself");
  board_->message(member_, {.verb = Verb::kSend, .peer = to, .source = {source}, .site = site});
}

void SimulatedCommunicator::receive(Buffer target, int from, CallSite site) {
  CHECK(from >= 0 && from < size(), "the sender is no member of the group");
  CHECK(from != member_, "a rank receives from itself");
  board_->message(member_,
                  {.verb = Verb::kReceive, .peer = from, .target = {target}, .site = site});
}

void SimulatedCommunicator::barrier(CallSite site) {
  board_->collective(member_, {.verb = Verb::kBarrier, .site = site});
}

}  // namespace isoshard::sim
