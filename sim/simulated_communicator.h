// One rank's end of a group's board: the Communicator of the simulated ranks. See sim/cluster.h.
#pragma once

#include <memory>
#include <string>

#include "core/communicator.h"
#include "sim/group_board.h"

namespace isoshard::sim {

class SimulatedCommunicator : public Communicator {
 public:
  SimulatedCommunicator(std::shared_ptr<GroupBoard> board, int rank_global);
  const std::string& group() const override { return board_->name(); }
  int rank() const override { return member_; }
  int size() const override { return static_cast<int>(board_->ranks().size()); }

  void all_reduce(Buffer values, Reduction reduction, CallSite site) override;
  void reduce_scatter(std::span<const ConstBuffer> source, Buffer target, Reduction reduction,
                      CallSite site) override;
  void all_gather(ConstBuffer source, std::span<const Buffer> target, CallSite site) override;
  void all_to_all(std::span<const ConstBuffer> source, std::span<const Buffer> target,
                  CallSite site) override;
  void broadcast(Buffer values, int root, CallSite site) override;
  void send(ConstBuffer source, int to, CallSite site) override;
  void receive(Buffer target, int from, CallSite site) override;
  void barrier(CallSite site) override;

 private:
  std::shared_ptr<GroupBoard> board_;
  int member_ = 0;
};

}  // namespace isoshard::sim
