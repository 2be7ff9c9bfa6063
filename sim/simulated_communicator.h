// The simulated interconnect: a board a group, on which its members put what they call; the last
// to come moves the values and wakes the others. Order, verb, dtype, counts, root and group are
// compared at the call. See sim/cluster.h.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/collective_trace.h"
#include "core/communicator.h"
#include "sim/faults.h"
#include "sim/scheduler.h"

namespace isoshard::sim {

class GroupBoard;
struct Call;

// What all boards of a cluster share.
struct Interconnect {
  Interconnect(uint64_t seed, size_t stack_bytes, int ranks)
      : scheduler(seed, stack_bytes),
        operations(static_cast<size_t>(ranks), 0),
        waits(static_cast<size_t>(ranks)) {}

  // What a rank waits in; the board can say for whom.
  struct Wait {
    const GroupBoard* board = nullptr;  // null: it does not wait
    const Call* call = nullptr;
    int64_t sequence = 0;
  };

  Scheduler scheduler;
  Faults faults;
  CollectiveTrace* trace = nullptr;
  std::vector<int64_t> operations;  // of each rank so far
  std::vector<Wait> waits;
  std::vector<int> dead;
  std::vector<FaultKind> struck;  // faults that have done something, in order
  std::vector<size_t> dropped;    // numbers in `faults` of kDrop that are used up

  bool is_dead(int rank) const;
  // The fault that stands at the rank's next operation, if any; counts the operation.
  const Fault* next_operation(int rank);
  // Whether the send that the rank is at gets lost.
  bool loses_send(int rank);
  [[noreturn]] void die(int rank);
};

// One member's call.
struct Call {
  Verb verb = Verb::kBarrier;
  Reduction reduction = Reduction::kSum;
  int peer = -1;
  std::vector<ConstBuffer> source;
  std::vector<Buffer> target;
  CallSite site;
  int64_t begin = 0;
  bool here = false;
};

class GroupBoard {
 public:
  GroupBoard(Interconnect* network, std::string name, std::vector<int> ranks);
  const std::string& name() const { return name_; }
  const std::vector<int>& ranks() const { return ranks_; }
  void collective(int member, Call call);
  void message(int member, Call call);
  // "all_gather (call 3 of group dp 0,1, 8 float32) at zero.cc:40"
  std::string describe(const Call& call, int64_t sequence) const;
  // Ranks of the world that a call waits for.
  std::vector<int> missing(const Call& call, int64_t sequence) const;

 private:
  struct Pending {
    std::vector<Call> calls;
    int arrived = 0;
    bool done = false;
    int left = 0;
  };
  void compare(const Call& earlier, int earlier_member, const Call& call, int member) const;
  void compare_counts(const Pending& pending) const;
  void move(Pending* pending);
  void record(int member, const Call& call, int64_t sequence);
  void wait(int member, const Call& call, int64_t sequence);

  Interconnect* network_;
  std::string name_;
  std::vector<int> ranks_;
  int trace_group_ = 0;
  std::vector<int64_t> sequence_;       // collectives that each member has called
  std::map<int64_t, Pending> pending_;  // by sequence
  struct Message {
    Call call;
    bool done = false;
  };
  // By (from, to): calls that wait for the other side.
  std::map<std::pair<int, int>, std::deque<Message*>> sends_, receives_;
  std::map<std::pair<bool, std::pair<int, int>>, int64_t> messages_;  // so far, by side and pair
  std::map<std::pair<int, int>, std::deque<std::vector<std::byte>>> copies_;  // of duplicates
};

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
