// See simulated_communicator.h.
#include "sim/simulated_communicator.h"

#include <algorithm>
#include <cstring>

#include "checkpoint/cancel.h"
#include "core/check.h"
#include "core/error.h"

namespace isoshard::sim {
namespace {

template <typename T>
void reduce_into(Buffer target, ConstBuffer source, Reduction reduction) {
  for (int64_t i = 0; i < target.count; ++i) {
    T a, b;
    std::memcpy(&a, target.data + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    std::memcpy(&b, source.data + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    if (reduction == Reduction::kMax)
      a = std::max(a, b);
    else
      a = static_cast<T>(a + b);
    std::memcpy(target.data + i * static_cast<int64_t>(sizeof(T)), &a, sizeof(T));
  }
}

void reduce_into(Buffer target, ConstBuffer source, Reduction reduction) {
  switch (target.dtype) {
    case DType::kFloat32:
      return reduce_into<float>(target, source, reduction);
    case DType::kInt64:
      return reduce_into<int64_t>(target, source, reduction);
    case DType::kInt32:
      return reduce_into<int32_t>(target, source, reduction);
    case DType::kUInt8:
      return reduce_into<uint8_t>(target, source, reduction);
    default:
      CHECK(false, std::string("no reduction of ") + isoshard::name(target.dtype));
  }
}

void copy(Buffer target, ConstBuffer source) {
  if (source.count == 0 || target.data == source.data) return;
  std::memmove(target.data, source.data, static_cast<size_t>(source.size_bytes()));
}

bool rooted(Verb verb) { return verb == Verb::kBroadcast; }

int64_t handed_over(const Call& call) {
  if (call.verb == Verb::kReceive) return call.target[0].count;
  int64_t count = 0;
  for (const ConstBuffer& source : call.source) count += source.count;
  return count;
}

DType dtype_of(const Call& call) {
  if (!call.source.empty()) return call.source[0].dtype;
  return call.target.empty() ? DType::kUInt8 : call.target[0].dtype;
}

void flip(std::vector<ConstBuffer>* sources, std::vector<std::byte>* copy, uint64_t choice) {
  for (ConstBuffer& source : *sources) {
    if (source.count == 0) continue;
    copy->assign(source.data, source.data + source.size_bytes());
    const uint64_t bit = choice % (copy->size() * 8);
    (*copy)[bit / 8] ^= static_cast<std::byte>(1u << (bit % 8));
    source.data = copy->data();
    return;
  }
}

}  // namespace

bool Interconnect::is_dead(int rank) const {
  return std::find(dead.begin(), dead.end(), rank) != dead.end();
}

bool Interconnect::loses_send(int rank) {
  const int64_t at = operations[static_cast<size_t>(rank)] - 1;
  for (size_t i = 0; i < faults.size(); ++i) {
    const bool due =
        faults[i].kind == FaultKind::kDrop && faults[i].rank == rank && faults[i].operation <= at;
    if (!due || std::find(dropped.begin(), dropped.end(), i) != dropped.end()) continue;
    dropped.push_back(i);
    struck.push_back(FaultKind::kDrop);
    return true;
  }
  return false;
}

void Interconnect::die(int rank) {
  if (!is_dead(rank)) {
    dead.push_back(rank);
    struck.push_back(FaultKind::kDieBefore);
  }
  throw RankDied{rank};
}

const Fault* Interconnect::next_operation(int rank) {
  if (scheduler.stopping()) throw TaskStopped{};
  checkpoint::throw_if_cancelled();
  if (is_dead(rank)) throw RankDied{rank};
  const int64_t number = operations[static_cast<size_t>(rank)]++;
  for (const Fault& fault : faults) {
    if (fault.rank != rank || fault.operation != number) continue;
    if (fault.kind == FaultKind::kSlow) {
      scheduler.set_eagerness(rank, 1.0 / 16);
      struck.push_back(fault.kind);
    }
    return &fault;
  }
  return nullptr;
}

GroupBoard::GroupBoard(Interconnect* network, std::string name, std::vector<int> ranks)
    : network_(network),
      name_(std::move(name)),
      ranks_(std::move(ranks)),
      trace_group_(network_->trace->group(name_)),
      sequence_(ranks_.size(), 0) {}

std::string GroupBoard::describe(const Call& call, int64_t sequence) const {
  std::string text = isoshard::name(call.verb);
  if (call.peer >= 0)
    text += (rooted(call.verb) ? " from root " : " with member ") + std::to_string(call.peer);
  return text + " (call " + std::to_string(sequence) + " of group " + name_ + ", " +
         std::to_string(handed_over(call)) + " " + isoshard::name(dtype_of(call)) + ") at " +
         CollectiveTrace::site_text(call.site);
}

void GroupBoard::record(int member, const Call& call, int64_t sequence) {
  network_->trace->add({.rank = ranks_[static_cast<size_t>(member)],
                        .verb = call.verb,
                        .group = trace_group_,
                        .sequence = sequence,
                        .dtype = dtype_of(call),
                        .count = handed_over(call),
                        .peer = call.peer < 0 ? -1 : ranks_[static_cast<size_t>(call.peer)],
                        .begin = call.begin,
                        .end = network_->scheduler.tick(),
                        .site = call.site});
}

std::vector<int> GroupBoard::missing(const Call& call, int64_t sequence) const {
  if (call.verb == Verb::kSend || call.verb == Verb::kReceive) {
    return {ranks_[static_cast<size_t>(call.peer)]};
  }
  std::vector<int> result;
  const Pending& pending = pending_.at(sequence);
  for (size_t other = 0; other < ranks_.size(); ++other) {
    if (!pending.calls[other].here) result.push_back(ranks_[other]);
  }
  return result;
}

void GroupBoard::wait(int member, const Call& call, int64_t sequence) {
  const int rank = ranks_[static_cast<size_t>(member)];
  Interconnect::Wait& wait = network_->waits[static_cast<size_t>(rank)];
  wait = {this, &call, sequence};
  network_->scheduler.block();
  wait.board = nullptr;
}

void GroupBoard::compare(const Call& earlier, int earlier_member, const Call& call,
                         int member) const {
  const bool agree = earlier.verb == call.verb && dtype_of(earlier) == dtype_of(call) &&
                     earlier.reduction == call.reduction &&
                     (!rooted(call.verb) || earlier.peer == call.peer);
  if (agree) return;
  const int64_t at = sequence_[static_cast<size_t>(member)];
  throw Error(ErrorInfo{
      .code = ErrorCode::kMismatch,
      .what = "Ranks of one group call different collectives.",
      .entry = "group " + name_ + ", call " + std::to_string(at),
      .expected = "rank " + std::to_string(ranks_[static_cast<size_t>(earlier_member)]) + ": " +
                  describe(earlier, at),
      .found =
          "rank " + std::to_string(ranks_[static_cast<size_t>(member)]) + ": " + describe(call, at),
      .next = "make all ranks of the group call the same verbs in the same order"});
}

void GroupBoard::compare_counts(const Pending& pending) const {
  const auto refuse = [&](size_t a, int64_t sends, size_t b, int64_t expects) {
    const int64_t at = sequence_[b] - 1;
    throw Error(ErrorInfo{
        .code = ErrorCode::kMismatch,
        .what = "Two ranks of a collective do not agree on a count.",
        .entry = "group " + name_ + ", call " + std::to_string(at),
        .expected = "rank " + std::to_string(ranks_[b]) + " expects " + std::to_string(expects) +
                    " elements from rank " + std::to_string(ranks_[a]) + ": " +
                    describe(pending.calls[b], at),
        .found = std::to_string(sends) + " are handed over: " + describe(pending.calls[a], at),
        .next = "compare the layouts that the two ranks compute"});
  };
  const std::vector<Call>& calls = pending.calls;
  for (size_t a = 0; a < calls.size(); ++a) {
    for (size_t b = 0; b < calls.size(); ++b) {
      int64_t sends = 0, expects = 0;
      switch (calls[a].verb) {
        case Verb::kAllToAll:
          sends = calls[a].source[b].count, expects = calls[b].target[a].count;
          break;
        case Verb::kReduceScatter:
          sends = calls[a].source[b].count, expects = calls[b].target[0].count;
          break;
        case Verb::kAllGather:
          sends = calls[a].source[0].count, expects = calls[b].target[a].count;
          break;
        case Verb::kAllReduce:
        case Verb::kBroadcast:
          sends = calls[a].target[0].count, expects = calls[b].target[0].count;
          break;
        default:
          break;
      }
      if (sends != expects) refuse(a, sends, b, expects);
    }
  }
}

void GroupBoard::move(Pending* pending) {
  std::vector<Call>& calls = pending->calls;
  const size_t n = calls.size();
  switch (calls[0].verb) {
    case Verb::kAllToAll:
      for (size_t a = 0; a < n; ++a) {
        for (size_t b = 0; b < n; ++b) copy(calls[b].target[a], calls[a].source[b]);
      }
      break;
    case Verb::kAllGather:
      for (size_t a = 0; a < n; ++a) {
        for (size_t b = 0; b < n; ++b) copy(calls[b].target[a], calls[a].source[0]);
      }
      break;
    case Verb::kReduceScatter:
      for (size_t b = 0; b < n; ++b) {
        copy(calls[b].target[0], calls[0].source[b]);
        for (size_t a = 1; a < n; ++a) {
          reduce_into(calls[b].target[0], calls[a].source[b], calls[0].reduction);
        }
      }
      break;
    case Verb::kAllReduce: {
      std::vector<std::byte> sum(calls[0].source[0].data,
                                 calls[0].source[0].data + calls[0].source[0].size_bytes());
      const Buffer total{calls[0].target[0].dtype, sum.data(), calls[0].target[0].count};
      for (size_t a = 1; a < n; ++a) reduce_into(total, calls[a].source[0], calls[0].reduction);
      for (Call& call : calls) copy(call.target[0], {total.dtype, total.data, total.count});
      break;
    }
    case Verb::kBroadcast:
      for (Call& call : calls) {
        copy(call.target[0], calls[static_cast<size_t>(calls[0].peer)].source[0]);
      }
      break;
    default:
      break;
  }
}

void GroupBoard::collective(int member, Call call) {
  const int rank = ranks_[static_cast<size_t>(member)];
  const Fault* fault = network_->next_operation(rank);
  std::vector<std::byte> corrupted;
  if (fault != nullptr) {
    if (fault->kind == FaultKind::kDieBefore) network_->die(rank);
    if (fault->kind == FaultKind::kCorrupt) flip(&call.source, &corrupted, fault->choice);
  }
  const int64_t sequence = sequence_[static_cast<size_t>(member)];
  Pending& pending = pending_[sequence];
  if (pending.calls.empty()) pending.calls.resize(ranks_.size());
  for (size_t other = 0; other < pending.calls.size(); ++other) {
    if (!pending.calls[other].here) continue;
    compare(pending.calls[other], static_cast<int>(other), call, member);
    break;
  }
  ++sequence_[static_cast<size_t>(member)];
  call.begin = network_->scheduler.tick();
  call.here = true;
  pending.calls[static_cast<size_t>(member)] = std::move(call);
  ++pending.arrived;
  if (fault != nullptr && fault->kind == FaultKind::kDieInside) {
    pending.calls[static_cast<size_t>(member)].here = false;  // its buffers go with it
    --pending.arrived;
    network_->die(rank);
  }
  if (pending.arrived == static_cast<int>(ranks_.size())) {
    compare_counts(pending);
    move(&pending);
    pending.done = true;
    for (const int other : ranks_) {
      if (other != rank) network_->scheduler.wake(other);
    }
  } else {
    wait(member, pending.calls[static_cast<size_t>(member)], sequence);
    CHECK(pending.done, "a rank was woken before its collective was done");
  }
  record(member, pending.calls[static_cast<size_t>(member)], sequence);
  if (++pending.left == static_cast<int>(ranks_.size())) pending_.erase(sequence);
  if (fault != nullptr && fault->kind == FaultKind::kDieAfter) network_->die(rank);
}

void GroupBoard::message(int member, Call call) {
  const int rank = ranks_[static_cast<size_t>(member)];
  const bool sends = call.verb == Verb::kSend;
  const int peer = call.peer;
  const Fault* fault = network_->next_operation(rank);
  std::vector<std::byte> corrupted;
  if (fault != nullptr) {
    if (fault->kind == FaultKind::kDieBefore) network_->die(rank);
    if (fault->kind == FaultKind::kCorrupt) flip(&call.source, &corrupted, fault->choice);
  }
  if (sends && network_->loses_send(rank)) return;
  const std::pair<int, int> key = sends ? std::pair(member, peer) : std::pair(peer, member);
  std::deque<Message*>& others = sends ? receives_[key] : sends_[key];
  std::deque<Message*>& own = sends ? sends_[key] : receives_[key];
  if (fault != nullptr && fault->kind == FaultKind::kDieInside) network_->die(rank);
  call.begin = network_->scheduler.tick();
  const int64_t number = messages_[{sends, key}]++;  // of this pair, on this side
  Message mine{std::move(call), false};
  const auto agree = [&](int64_t count, const std::string& other) {
    if (count == handed_over(mine.call)) return;
    throw Error(ErrorInfo{.code = ErrorCode::kMismatch,
                          .what = "A send and its receive do not agree.",
                          .entry = "group " + name_,
                          .expected = other,
                          .found = describe(mine.call, 0),
                          .next = "compare the shapes that the two ranks compute"});
  };
  std::deque<std::vector<std::byte>>& copies = copies_[key];
  if (!sends && !copies.empty()) {
    const Buffer target = mine.call.target[0];
    agree(static_cast<int64_t>(copies.front().size()) / item_size_bytes(target.dtype),
          "a message that came twice");
    copy(target, {target.dtype, copies.front().data(), target.count});
    copies.pop_front();
  } else if (!others.empty()) {
    Message& other = *others.front();
    agree(dtype_of(other.call) == dtype_of(mine.call) ? handed_over(other.call) : -1,
          describe(other.call, 0));
    if (sends)
      copy(other.call.target[0], mine.call.source[0]);
    else
      copy(mine.call.target[0], other.call.source[0]);
    others.pop_front();
    other.done = true;
    network_->scheduler.wake(ranks_[static_cast<size_t>(peer)]);
  } else {
    own.push_back(&mine);
    wait(member, mine.call, number);
    CHECK(mine.done, "a rank was woken before its message was there");
  }
  if (sends && fault != nullptr && fault->kind == FaultKind::kDuplicate) {
    const ConstBuffer& source = mine.call.source[0];
    copies.emplace_back(source.data, source.data + source.size_bytes());
  }
  record(member, mine.call, number);
  if (fault != nullptr && fault->kind == FaultKind::kDieAfter) network_->die(rank);
}

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
  board_->collective(member_, {.verb = Verb::kBroadcast,
                               .peer = root,
                               .source = {{values.dtype, values.data, values.count}},
                               .target = {values},
                               .site = site});
}

void SimulatedCommunicator::send(ConstBuffer source, int to, CallSite site) {
  CHECK(to != member_, "a rank sends to itself");
  board_->message(member_, {.verb = Verb::kSend, .peer = to, .source = {source}, .site = site});
}

void SimulatedCommunicator::receive(Buffer target, int from, CallSite site) {
  CHECK(from != member_, "a rank receives from itself");
  board_->message(member_,
                  {.verb = Verb::kReceive, .peer = from, .target = {target}, .site = site});
}

void SimulatedCommunicator::barrier(CallSite site) {
  board_->collective(member_, {.verb = Verb::kBarrier, .site = site});
}

}  // namespace isoshard::sim
