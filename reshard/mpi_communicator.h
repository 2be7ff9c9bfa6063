// A group of ranks over messages (mpi_transport.h): the verbs of core/communicator.h.
#pragma once

#include <string>
#include <vector>

#include "core/communicator.h"
#include "reshard/mpi_transport.h"

namespace isoshard::reshard {

class MpiCommunicator : public Communicator {
 public:
  // `ranks` of the world, in the order of the group; this process's among them.
  MpiCommunicator(MpiTransport& transport, std::string name, std::vector<int> ranks,
                  bool compare_calls);
  const std::string& group() const override { return name_; }
  int rank() const override { return member_; }
  int size() const override { return static_cast<int>(ranks_.size()); }

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
  struct Call;
  struct Card;
  std::string describe(const Call& call) const;
  Card card_for(const Call& call, int peer) const;
  std::string tell(const Card& card, int member) const;
  void compare(const Call& call);
  void compare_message(const Call& call);
  void exchange_parts(const Call& call, std::span<const ConstBuffer> source,
                      std::span<const Buffer> target);
  std::vector<std::byte> reduced(const Call& call, std::span<const ConstBuffer> source,
                                 int64_t count);

  MpiTransport& transport_;
  std::string name_;
  std::vector<int> ranks_;
  int member_ = 0;
  bool compare_calls_ = true;
  int tag_ = 0;                           // of cards; tag_ + 1: of refusals; tag_ + 2: of data
  int64_t calls_ = 0;                     // collectives so far
  std::vector<int64_t> sent_, received_;  // messages to and from each member so far
};

}  // namespace isoshard::reshard
