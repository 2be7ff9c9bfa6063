// See group_board.h.
#include "sim/group_board.h"

#include <algorithm>
#include <cstring>

#include "core/check.h"
#include "core/element_reduction.h"
#include "core/error.h"
#include "core/mutant.h"
#include "core/random.h"

namespace isoshard::sim {
namespace {

constexpr size_t kLargeGroup = 64;

void copy(Buffer target, ConstBuffer source) {
  if (source.count == 0 || target.data == source.data) return;
  std::memmove(target.data, source.data, static_cast<size_t>(source.size_bytes()));
}

// What is exchanged in place is copied first.
void keep_sources(std::vector<Call>* calls, std::vector<std::vector<std::byte>>* kept) {
  for (Call& call : *calls) {
    for (size_t p = 0; p < call.source.size(); ++p) {
      ConstBuffer& source = call.source[p];
      if (source.data != call.target[p].data || source.count == 0) continue;
      kept->emplace_back(source.data, source.data + source.size_bytes());
      source.data = kept->back().data();
    }
  }
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

// Nothing has no dtype.
bool one_dtype(const Call& a, const Call& b) {
  return dtype_of(a) == dtype_of(b) || handed_over(a) == 0 || handed_over(b) == 0;
}

// False: the call hands nothing over.
bool flip(std::vector<ConstBuffer>* sources, std::vector<std::byte>* copy, uint64_t choice) {
  for (ConstBuffer& source : *sources) {
    if (source.count == 0) continue;
    copy->assign(source.data, source.data + source.size_bytes());
    const uint64_t bit = choice % (copy->size() * 8);
    (*copy)[bit / 8] ^= static_cast<std::byte>(1u << (bit % 8));
    source.data = copy->data();
    return true;
  }
  return false;
}

// What a member's call hands over to another, or to itself.
Share handed_over(const Call& call, size_t to) {
  const bool one_each = call.verb == Verb::kAllToAll || call.verb == Verb::kReduceScatter;
  const ConstBuffer& source = call.source[one_each ? to : 0];
  return {source.dtype, source.count};
}

Share expected(const Call& call, size_t from) {
  const bool one_each = call.verb == Verb::kAllToAll || call.verb == Verb::kAllGather;
  const Buffer& target = call.target[one_each ? from : 0];
  return {target.dtype, target.count};
}

std::string text(const Share& share) {
  return std::to_string(share.count) + " elements of " + isoshard::name(share.dtype);
}

// Whether the call hands over and expects the same to and from every member; what that is.
bool is_even(const Call& call, Share* share) {
  *share = handed_over(call, 0);
  for (const ConstBuffer& source : call.source) {
    if (!(Share{source.dtype, source.count} == *share)) return false;
  }
  for (const Buffer& target : call.target) {
    if (!(Share{target.dtype, target.count} == *share)) return false;
  }
  return true;
}

bool reduces(Verb verb) { return verb == Verb::kAllReduce || verb == Verb::kReduceScatter; }

}  // namespace

std::string listed(const std::vector<int>& ranks, size_t most) {
  std::string text;
  for (size_t i = 0; i < ranks.size() && i < most; ++i) {
    text += (i == 0 ? "" : ",") + std::to_string(ranks[i]);
  }
  if (ranks.size() > most) text += ",… (" + std::to_string(ranks.size()) + " ranks)";
  return text;
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
  text += " (call " + std::to_string(sequence) + " of group " + name_ + ", " +
          std::to_string(handed_over(call)) + " " + isoshard::name(dtype_of(call));
  if (reduces(call.verb)) text += call.reduction == Reduction::kMax ? ", maximum" : ", sum";
  return text + ") at " + CollectiveTrace::site_text(call.site);
}

std::string GroupBoard::of_rank(int member, const Call& call, int64_t sequence) const {
  return "rank " + std::to_string(ranks_[static_cast<size_t>(member)]) + ": " +
         describe(call, sequence);
}

// Ranks of the world that a call waits for.
template <typename Visit>
void GroupBoard::each_missing(const Call& call, int64_t sequence, const Visit& visit) const {
  if (call.verb == Verb::kSend || call.verb == Verb::kReceive) {
    visit(ranks_[static_cast<size_t>(call.peer)]);
    return;
  }
  const Pending& pending = pending_.at(sequence);
  for (size_t other = 0; other < ranks_.size(); ++other) {
    if (!pending.here[other]) visit(ranks_[other]);
  }
}

std::string GroupBoard::waiting(int rank, const Call& call, int64_t sequence) const {
  std::vector<int> missing;
  each_missing(call, sequence, [&](int other) {
    if (other != rank) missing.push_back(other);
  });
  std::string text = "rank " + std::to_string(rank) + " waits for rank" +
                     (missing.size() > 1 ? "s " : " ") + listed(missing, 8) + " in " +
                     describe(call, sequence);
  if (call.verb != Verb::kReceive) return text;
  const auto member = std::find(ranks_.begin(), ranks_.end(), rank) - ranks_.begin();
  const auto lost = dropped_.find({{call.peer, static_cast<int>(member)}, sequence});
  return lost == dropped_.end() ? text : text + ", whose message was lost: " + lost->second;
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

void GroupBoard::wait(int member, const Call& call, int64_t sequence) {
  const int rank = ranks_[static_cast<size_t>(member)];
  network_->waits[static_cast<size_t>(rank)] = {this, &call, sequence};
  network_->scheduler.block();
}

// Whether a call of this board waits for that rank of the world.
bool GroupBoard::waits_for(int rank, const Call& call, int64_t sequence) const {
  if (call.verb == Verb::kSend || call.verb == Verb::kReceive) {
    return ranks_[static_cast<size_t>(call.peer)] == rank;
  }
  const auto found = std::lower_bound(ranks_.begin(), ranks_.end(), rank);  // they ascend
  if (found == ranks_.end() || *found != rank) return false;
  return !pending_.at(sequence).here[static_cast<size_t>(found - ranks_.begin())];
}

// Two ranks that wait for each other on different boards, or in different calls of one, do so for
// ever; longer circles are found once no rank can go on.
void GroupBoard::refuse_crossed(int member, const Call& call, int64_t sequence) const {
  const int rank = ranks_[static_cast<size_t>(member)];
  if (mutant("crossed_wait_unseen")) return;
  each_missing(call, sequence, [&](int other) {
    const Interconnect::Wait& wait = network_->waits[static_cast<size_t>(other)];
    if (wait.board == nullptr || !wait.board->waits_for(rank, *wait.call, wait.sequence)) return;
    throw Error(ErrorInfo{
        .code = ErrorCode::kMismatch,
        .what = "Deadlock: two ranks wait for each other.",
        .expected = "every rank calls the same collectives of the same groups in one order",
        .found = wait.board->waiting(other, *wait.call, wait.sequence) + "; " +
                 waiting(rank, call, sequence),
        .next = "look for the condition that made the two ranks go different ways"});
  });
}

void GroupBoard::compare(const Call& earlier, int earlier_member, const Call& call,
                         int member) const {
  const bool agree =
      (earlier.verb == call.verb || mutant("collective_verb_unchecked")) &&
      one_dtype(earlier, call) &&
      (earlier.reduction == call.reduction || mutant("collective_reduction_unchecked")) &&
      (!rooted(call.verb) || earlier.peer == call.peer || mutant("collective_root_unchecked"));
  if (agree) return;
  const int64_t at = sequence_[static_cast<size_t>(member)];
  throw Error(
      ErrorInfo{.code = ErrorCode::kMismatch,
                .what = "Ranks of one group call different collectives.",
                .entry = "group " + name_ + ", call " + std::to_string(at),
                .expected = of_rank(earlier_member, earlier, at),
                .found = of_rank(member, call, at),
                .next = "make all ranks of the group call the same verbs in the same order"});
}

// What member a of a collective hands over to b, and b expects of it.
void GroupBoard::compare_pair(const Call& from, size_t a, const Call& to, size_t b,
                              int64_t at) const {
  const Share sends = handed_over(from, b), expects = expected(to, a);
  if (sends == expects || mutant("collective_count_unchecked")) return;
  throw Error(ErrorInfo{.code = ErrorCode::kMismatch,
                        .what = "Two ranks of a collective do not agree on a count or a dtype.",
                        .entry = "group " + name_ + ", call " + std::to_string(at),
                        .expected = "rank " + std::to_string(ranks_[b]) + " expects " +
                                    text(expects) + " from rank " + std::to_string(ranks_[a]) +
                                    ": " + describe(to, at),
                        .found = "rank " + std::to_string(ranks_[a]) + " hands over " +
                                 text(sends) + ": " + describe(from, at),
                        .next = "compare the layouts that the two ranks compute"});
}

// What a member hands over, less what it expects; of all members together 0 where they agree.
uint64_t GroupBoard::balance_of(size_t member, const Call& call) const {
  const auto word = [](size_t from, size_t to, const Share& share) {
    const auto dtype = share.count == 0 ? 0 : static_cast<uint64_t>(share.dtype);
    return mix((from << 32 | to) ^ mix(static_cast<uint64_t>(share.count) ^ dtype << 48));
  };
  uint64_t sum = 0;
  for (size_t other = 0; other < ranks_.size(); ++other) {
    sum += word(member, other, handed_over(call, other));
    sum -= word(other, member, expected(call, other));
  }
  return sum;
}

// Of a call that comes against those that are here, itself included, both ways. In a large group
// with counts of their own for each pair, that is done once, when the last one comes, and pair by
// pair only where the words of all pairs do not cancel.
void GroupBoard::compare_counts(Pending* pending, int member, const Call& call) const {
  if (call.verb == Verb::kBarrier) return;
  const std::vector<Call>& calls = pending->calls;
  const size_t mine = static_cast<size_t>(member);
  const bool large = ranks_.size() > kLargeGroup;
  const int64_t at = sequence_[mine];
  Share share;
  const bool own = is_even(call, &share);
  if (pending->even && own) {
    if (pending->arrived > 0 && !(share == pending->share)) {
      const size_t first =
          static_cast<size_t>(std::ranges::find(pending->here, true) - pending->here.begin());
      compare_pair(call, mine, calls[first], first, at);
      compare_pair(calls[first], first, call, mine, at);
    }
    pending->share = share;
    return;
  }
  for (size_t other = 0; large && pending->even && other < calls.size(); ++other) {
    if (pending->here[other]) pending->balance += balance_of(other, calls[other]);
  }
  pending->even = false;
  if (large) {
    pending->balance += balance_of(mine, call);
    const bool last = pending->arrived + 1 == static_cast<int>(ranks_.size());
    if (!last || pending->balance == 0) return;
  }
  compare_pair(call, mine, call, mine, at);
  for (size_t other = 0; other < calls.size(); ++other) {
    if (!pending->here[other]) continue;
    compare_pair(call, mine, calls[other], other, at);
    compare_pair(calls[other], other, call, mine, at);
    for (size_t third = 0; large && third < calls.size(); ++third) {
      if (third != mine) compare_pair(calls[other], other, calls[third], third, at);
    }
  }
}

// Of a message that waits on the other side and the one that comes to meet it.
void GroupBoard::compare_messages(const Message& other, const Message& mine) const {
  const bool counts =
      handed_over(other.call) == handed_over(mine.call) && one_dtype(other.call, mine.call);
  if (other.number == mine.number && (counts || mutant("message_count_unchecked"))) return;
  const int other_member = mine.call.peer, member = other.call.peer;
  if (mutant("message_gap_unseen")) return;
  const bool gap = other.number != mine.number;
  const bool sends = mine.call.verb == Verb::kSend;
  const Channel channel = sends ? Channel(member, other_member) : Channel(other_member, member);
  const auto lost = dropped_.find({channel, std::min(other.number, mine.number)});
  throw Error(ErrorInfo{.code = ErrorCode::kMismatch,
                        .what = gap ? "A message between two ranks was lost."
                                    : "A send and its receive do not agree on a count or a dtype.",
                        .entry = "group " + name_ +
                                 (lost == dropped_.end() ? "" : "; what was lost: " + lost->second),
                        .expected = of_rank(other_member, other.call, other.number),
                        .found = of_rank(member, mine.call, mine.number),
                        .next = gap ? "look into the connection of the two ranks"
                                    : "compare the shapes that the two ranks compute"});
}

void GroupBoard::move(Pending* pending) {
  std::vector<Call>& calls = pending->calls;
  const size_t n = calls.size();
  std::vector<std::vector<std::byte>> kept;
  switch (calls[0].verb) {
    case Verb::kAllToAll:
      keep_sources(&calls, &kept);
      for (size_t a = 0; a < n; ++a) {
        for (size_t b = 0; b < n; ++b)
          copy(calls[b].target[a], calls[a].source[mutant("exchange_transposed") ? a : b]);
      }
      break;
    case Verb::kAllGather:
      for (size_t a = 0; a < n; ++a) {
        for (size_t b = 0; b < n; ++b)
          copy(calls[b].target[mutant("gather_reversed") ? n - 1 - a : a], calls[a].source[0]);
      }
      break;
    case Verb::kReduceScatter:
      for (size_t b = 0; b < n; ++b) {
        const ConstBuffer& first = calls[0].source[b];
        std::vector<std::byte> sum(first.data, first.data + first.size_bytes());
        const Buffer total{first.dtype, sum.data(), first.count};
        for (size_t a = 1; a < n; ++a) {
          if (!mutant("scatter_keeps_first"))
            reduce_into(total, calls[a].source[b], calls[0].reduction);
        }
        copy(calls[b].target[0], {total.dtype, total.data, total.count});
      }
      break;
    case Verb::kAllReduce: {
      std::vector<std::byte> sum(calls[0].source[0].data,
                                 calls[0].source[0].data + calls[0].source[0].size_bytes());
      const Buffer total{calls[0].target[0].dtype, sum.data(), calls[0].target[0].count};
      for (size_t a = 1; a + mutant("reduce_without_last") < n; ++a)
        reduce_into(total, calls[a].source[0], calls[0].reduction);
      for (Call& call : calls) copy(call.target[0], {total.dtype, total.data, total.count});
      break;
    }
    case Verb::kBroadcast:
      for (Call& call : calls) {
        copy(call.target[0],
             calls[static_cast<size_t>(mutant("broadcast_from_first") ? 0 : calls[0].peer)]
                 .source[0]);
      }
      break;
    default:
      break;
  }
}

// What every call begins with: its faults, but for those inside and after it.
const Fault* GroupBoard::begin(int rank, Call* call, std::vector<std::byte>* corrupted) {
  const Fault* fault = network_->next_operation(rank);
  call->begin = network_->scheduler.tick();
  if (fault == nullptr) return nullptr;
  if (fault->kind == FaultKind::kDieBefore) network_->die(rank);
  if (fault->kind == FaultKind::kCorrupt && flip(&call->source, corrupted, fault->choice)) {
    network_->struck.push_back(fault->kind);
  }
  if (fault->kind == FaultKind::kDelay || fault->kind == FaultKind::kReorder) {
    network_->hold_back(rank, *fault);
  }
  return fault;
}

void GroupBoard::collective(int member, Call call) {
  const int rank = ranks_[static_cast<size_t>(member)];
  std::vector<std::byte> corrupted;
  const Fault* fault = begin(rank, &call, &corrupted);
  const int64_t sequence = sequence_[static_cast<size_t>(member)];
  Pending& pending = pending_[sequence];
  if (pending.calls.empty()) {
    pending.calls.resize(ranks_.size());
    pending.here.resize(ranks_.size());
  }
  for (size_t other = 0; other < pending.calls.size(); ++other) {
    if (!pending.here[other]) continue;
    compare(pending.calls[other], static_cast<int>(other), call, member);
    break;
  }
  compare_counts(&pending, member, call);
  if (fault != nullptr && fault->kind == FaultKind::kDieInside) network_->die(rank);
  refuse_crossed(member, call, sequence);
  ++sequence_[static_cast<size_t>(member)];
  pending.here[static_cast<size_t>(member)] = true;
  pending.calls[static_cast<size_t>(member)] = std::move(call);
  network_->overtake();
  if (++pending.arrived == static_cast<int>(ranks_.size())) {
    move(&pending);
    pending.done = true;
    for (const int other : ranks_) {
      if (other != rank) network_->wake(other);
    }
  } else {
    wait(member, pending.calls[static_cast<size_t>(member)], sequence);
    CHECK(pending.done, "a rank was woken before its collective was done");
  }
  record(member, pending.calls[static_cast<size_t>(member)], sequence);
  if (++pending.left == static_cast<int>(ranks_.size())) pending_.erase(sequence);
  if (fault != nullptr && fault->kind == FaultKind::kDieAfter) network_->die(rank);
}

// The network delivers a message once more, behind the one that has been received.
void GroupBoard::duplicate(const Message& message, const Channel& channel) {
  const ConstBuffer& source = message.call.source[0];
  auto copy = std::make_shared<Message>(Message{message.call, message.number});
  copy->copied.assign(source.data, source.data + source.size_bytes());
  copy->call.source[0].data = copy->copied.data();
  sends_[channel].push_back(std::move(copy));
}

void GroupBoard::message(int member, Call call) {
  const int rank = ranks_[static_cast<size_t>(member)];
  const bool sends = call.verb == Verb::kSend;
  const int peer = call.peer;
  std::vector<std::byte> corrupted;
  const Fault* fault = begin(rank, &call, &corrupted);
  const Channel channel = sends ? Channel(member, peer) : Channel(peer, member);
  const int64_t number = messages_[{sends, channel}]++;
  if (sends && network_->strikes_send(rank, FaultKind::kDrop)) {
    dropped_[{channel, number}] = of_rank(member, call, number);
    return;
  }
  if (fault != nullptr && fault->kind == FaultKind::kDieInside) network_->die(rank);
  auto& others = sends ? receives_[channel] : sends_[channel];
  while (!sends && !others.empty() && others.front()->number < number &&
         !mutant("duplicate_heard_twice"))
    others.pop_front();  // copies
  const auto mine = std::make_shared<Message>(Message{std::move(call), number});
  if (sends) network_->overtake();
  if (!others.empty()) {
    const std::shared_ptr<Message> other = others.front();
    compare_messages(*other, *mine);
    const Message& from = sends ? *mine : *other;
    copy((sends ? *other : *mine).call.target[0], from.call.source[0]);
    others.pop_front();
    other->done = true;
    network_->wake(ranks_[static_cast<size_t>(peer)]);
  } else {
    refuse_crossed(member, mine->call, number);
    (sends ? sends_ : receives_)[channel].push_back(mine);
    wait(member, mine->call, number);
    CHECK(mine->done, "a rank was woken before its message was there");
  }
  if (sends && network_->strikes_send(rank, FaultKind::kDuplicate)) duplicate(*mine, channel);
  record(member, mine->call, number);
  if (fault != nullptr && fault->kind == FaultKind::kDieAfter) network_->die(rank);
}

}  // namespace isoshard::sim
