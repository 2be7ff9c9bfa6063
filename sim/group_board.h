// A board a group, on which its members put what they call; the last to come moves the values and
// wakes the others. Order, verb, dtype, counts, reduction and root are compared at the call (of
// more than 64 members, counts of each pair's own once the last has come), and so is whether two
// ranks wait for each other in different ones: each Error(kMismatch) names both ranks and call
// sites. Messages of one channel (a sender and a receiver of one group) bear numbers, so one that
// comes twice is known and thrown away, and a gap is an error. A corrupted value is not noticed
// here.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/communicator.h"
#include "sim/interconnect.h"

namespace isoshard::sim {

// What one member's call hands over to one member, or expects from one.
struct Share {
  DType dtype = DType::kUInt8;
  int64_t count = 0;
  // Nothing has no dtype.
  bool operator==(const Share& other) const {
    return count == other.count && (count == 0 || dtype == other.dtype);
  }
};

struct Call {
  Verb verb = Verb::kBarrier;
  Reduction reduction = Reduction::kSum;
  int peer = -1;  // member: the root, or the other side of a message
  std::vector<ConstBuffer> source;
  std::vector<Buffer> target;
  CallSite site;
  int64_t begin = 0;  // tick
};

// "0,1,2,… (9 ranks)"
std::string listed(const std::vector<int>& ranks, size_t most);

class GroupBoard {
 public:
  GroupBoard(Interconnect* network, std::string name, std::vector<int> ranks);
  const std::string& name() const { return name_; }
  const std::vector<int>& ranks() const { return ranks_; }
  void collective(int member, Call call);
  void message(int member, Call call);
  // "rank 1 waits for rank 0 in all_gather (call 3 of group dp 0,1, 8 float32) at zero.cc:40"
  std::string waiting(int rank, const Call& call, int64_t sequence) const;

 private:
  struct Pending {
    std::vector<Call> calls;  // by member
    std::vector<bool> here;   // which of them have come
    // Each call so far hands over and expects `share` to and from every member: there is nothing to
    // compare pair by pair.
    bool even = true;
    Share share;
    uint64_t balance = 0;  // of a large group whose calls are not even: balance_of() of each
    int arrived = 0;
    bool done = false;
    int left = 0;
  };
  struct Message {
    Call call;
    int64_t number = 0;  // in its channel
    bool done = false;
    std::vector<std::byte> copied;  // of a copy that the network made: what its call points to
  };
  using Channel = std::pair<int, int>;  // members: from, to

  std::string describe(const Call& call, int64_t sequence) const;
  std::string of_rank(int member, const Call& call, int64_t sequence) const;
  template <typename Visit>
  void each_missing(const Call& call, int64_t sequence, const Visit& visit) const;

  const Fault* begin(int rank, Call* call, std::vector<std::byte>* corrupted);
  void compare(const Call& earlier, int earlier_member, const Call& call, int member) const;
  uint64_t balance_of(size_t member, const Call& call) const;
  void compare_pair(const Call& from, size_t a, const Call& to, size_t b, int64_t at) const;
  void compare_counts(Pending* pending, int member, const Call& call) const;
  void compare_messages(const Message& other, const Message& mine) const;
  void refuse_crossed(int member, const Call& call, int64_t sequence) const;
  bool waits_for(int rank, const Call& call, int64_t sequence) const;
  void move(Pending* pending);
  void duplicate(const Message& message, const Channel& channel);
  void record(int member, const Call& call, int64_t sequence);
  void wait(int member, const Call& call, int64_t sequence);

  Interconnect* network_;
  std::string name_;
  std::vector<int> ranks_;
  int trace_group_ = 0;
  std::vector<int64_t> sequence_;       // collectives that each member has called
  std::map<int64_t, Pending> pending_;  // by sequence
  // Calls that wait for the other side, and copies in front of them that nobody waits for.
  std::map<Channel, std::deque<std::shared_ptr<Message>>> sends_, receives_;
  std::map<std::pair<bool, Channel>, int64_t> messages_;        // so far, by side: true is sends
  std::map<std::pair<Channel, int64_t>, std::string> dropped_;  // by number: the send
};

}  // namespace isoshard::sim
