// See mpi_communicator.h.
#include "reshard/mpi_communicator.h"

#include <algorithm>
#include <cstring>

#include "core/check.h"
#include "core/collective_trace.h"
#include "core/element_reduction.h"
#include "core/error.h"
#include "core/random.h"

namespace isoshard::reshard {

// What one member tells another before a call: what it does, and what passes between the two.
struct MpiCommunicator::Card {
  int32_t verb = 0, reduction = 0, peer = -1;
  int32_t sends_dtype = 0, expects_dtype = 0;
  int64_t sends = 0, expects = 0;  // elements
  int64_t call = 0;                // its number in the group, or between the two
  uint64_t group = 0;              // of its name and ranks
  char site[104] = {};
};

struct MpiCommunicator::Call {
  Verb verb = Verb::kBarrier;
  Reduction reduction = Reduction::kSum;
  int peer = -1;  // a member: the root, or the other side
  std::span<const ConstBuffer> source = {};
  std::span<const Buffer> target = {};
  CallSite site = {};
  int64_t number = 0;

  // What goes to a member and what is to come from it; one buffer may be for all.
  ConstBuffer sent_to(int member) const {
    if (source.empty()) return {};
    return source[source.size() == 1 ? 0 : static_cast<size_t>(member)];
  }
  Buffer expected_of(int member) const {
    if (target.empty()) return {};
    return target[target.size() == 1 ? 0 : static_cast<size_t>(member)];
  }
};

namespace {

constexpr int kTagsOfAGroup = 4;

uint64_t hash_of(const std::string& name, const std::vector<int>& ranks) {
  uint64_t hash = 0;
  for (const char c : name) hash = mix(hash ^ static_cast<unsigned char>(c));
  for (const int rank : ranks) hash = mix(hash ^ static_cast<uint64_t>(rank));
  return hash;
}

bool is_message(Verb verb) { return verb == Verb::kSend || verb == Verb::kReceive; }
bool reduces(Verb verb) { return verb == Verb::kAllReduce || verb == Verb::kReduceScatter; }

std::string share_text(int64_t count, int32_t dtype) {
  return std::to_string(count) + " elements of " + name(static_cast<DType>(dtype));
}

// Nothing has no dtype.
bool is_share(int64_t count, int32_t dtype, int64_t other_count, int32_t other_dtype) {
  return count == other_count && (count == 0 || dtype == other_dtype);
}

std::byte* bytes_of(void* data) { return static_cast<std::byte*>(data); }
const std::byte* bytes_of(const void* data) { return static_cast<const std::byte*>(data); }

void copy(const Buffer& target, const ConstBuffer& source) {
  if (source.count == 0 || target.data == source.data) return;
  std::memmove(target.data, source.data, static_cast<size_t>(source.size_bytes()));
}

}  // namespace

MpiCommunicator::MpiCommunicator(MpiTransport& transport, std::string name, std::vector<int> ranks,
                                 bool compare_calls)
    : transport_(transport),
      name_(std::move(name)),
      ranks_(std::move(ranks)),
      compare_calls_(compare_calls),
      sent_(ranks_.size()),
      received_(ranks_.size()) {
  const auto found = std::ranges::find(ranks_, transport_.rank());
  CHECK(found != ranks_.end(), "this rank is not in the group");
  member_ = static_cast<int>(found - ranks_.begin());
  const auto places = static_cast<uint64_t>(transport_.tags() / kTagsOfAGroup);
  tag_ = static_cast<int>(hash_of(name_, ranks_) % places) * kTagsOfAGroup;
}

std::string MpiCommunicator::describe(const Call& call) const {
  std::string text = isoshard::name(call.verb);
  if (call.peer >= 0)
    text += (is_message(call.verb) ? " with rank " : " from rank ") +
            std::to_string(ranks_[static_cast<size_t>(call.peer)]);
  return text + " (call " + std::to_string(call.number) + " of group " + name_ + ") at " +
         CollectiveTrace::site_text(call.site);
}

MpiCommunicator::Card MpiCommunicator::card_for(const Call& call, int peer) const {
  const ConstBuffer sent = call.sent_to(peer);
  const Buffer expected = call.expected_of(peer);
  Card card{.verb = static_cast<int32_t>(call.verb),
            .reduction = reduces(call.verb) ? static_cast<int32_t>(call.reduction) : 0,
            .peer = is_message(call.verb) ? -1 : call.peer,
            .sends_dtype = static_cast<int32_t>(sent.dtype),
            .expects_dtype = static_cast<int32_t>(expected.dtype),
            .sends = sent.count,
            .expects = expected.count,
            .call = call.number,
            .group = hash_of(name_, ranks_)};
  const std::string site = CollectiveTrace::site_text(call.site);
  const size_t most = sizeof(card.site) - 1;
  site.copy(card.site, most, site.size() > most ? site.size() - most : 0);
  return card;
}

std::string MpiCommunicator::tell(const Card& card, int member) const {
  const auto verb = static_cast<Verb>(card.verb);
  std::string text =
      "rank " + std::to_string(ranks_[static_cast<size_t>(member)]) + ": " + isoshard::name(verb);
  if (card.peer >= 0) text += " from root " + std::to_string(card.peer);
  text += " (call " + std::to_string(card.call) + " of group " + name_;
  if (verb != Verb::kReceive && verb != Verb::kBarrier)
    text += ", hands over " + share_text(card.sends, card.sends_dtype);
  if (verb != Verb::kSend && verb != Verb::kBarrier)
    text += ", expects " + share_text(card.expects, card.expects_dtype);
  if (reduces(verb))
    text += card.reduction == static_cast<int32_t>(Reduction::kMax) ? ", maximum" : ", sum";
  return text + ") at " + std::string(card.site, strnlen(card.site, sizeof(card.site)));
}

// Cards from each to each, then a word from each to each whether it goes on: all refuse, or none.
void MpiCommunicator::compare(const Call& call) {
  const size_t n = ranks_.size();
  std::vector<Card> own(n), theirs(n);
  std::vector<MpiSend> sends;
  std::vector<MpiReceive> receives;
  for (size_t p = 0; p < n; ++p) {
    own[p] = card_for(call, static_cast<int>(p));
    if (static_cast<int>(p) == member_) continue;
    sends.push_back({ranks_[p], bytes_of(&own[p]), sizeof(Card)});
    receives.push_back({ranks_[p], bytes_of(&theirs[p]), sizeof(Card)});
  }
  theirs[static_cast<size_t>(member_)] = own[static_cast<size_t>(member_)];
  transport_.move(sends, receives, tag_, false, describe(call));
  uint8_t refused = 0;
  size_t other = n;
  for (size_t p = 0; p < n && refused == 0; ++p) {
    const Card &a = own[p], &b = theirs[p];
    const bool same = a.verb == b.verb && a.reduction == b.reduction && a.peer == b.peer &&
                      a.call == b.call && a.group == b.group;
    const bool fit = is_share(a.sends, a.sends_dtype, b.expects, b.expects_dtype) &&
                     is_share(b.sends, b.sends_dtype, a.expects, a.expects_dtype);
    if (same && fit) continue;
    refused = same ? 2 : 1;
    other = p;
  }
  std::vector<uint8_t> words(n);
  sends.clear();
  receives.clear();
  for (size_t p = 0; p < n; ++p) {
    if (static_cast<int>(p) == member_) continue;
    sends.push_back({ranks_[p], bytes_of(&refused), 1});
    receives.push_back({ranks_[p], bytes_of(&words[p]), 1});
  }
  transport_.move(sends, receives, tag_ + 1, false, describe(call));
  const auto elsewhere = std::ranges::find_if(words, [](uint8_t word) { return word != 0; });
  if (refused == 0 && elsewhere == words.end()) return;
  const std::string entry = "group " + name_ + ", call " + std::to_string(call.number);
  if (refused == 0) {
    const int rank = ranks_[static_cast<size_t>(elsewhere - words.begin())];
    throw Error(ErrorInfo{.code = ErrorCode::kMismatch,
                          .what = "Other ranks of the group do not agree on this call.",
                          .entry = entry,
                          .found = "rank " + std::to_string(rank) + " refuses it, and says why",
                          .next = "look at what rank " + std::to_string(rank) + " prints"});
  }
  throw Error(ErrorInfo{
      .code = ErrorCode::kMismatch,
      .what = refused == 1 ? "Ranks of one group call different collectives."
                           : "Two ranks of a collective do not agree on a count or a dtype.",
      .entry = entry,
      .expected = tell(theirs[other], static_cast<int>(other)),
      .found = tell(own[other], member_),
      .next = refused == 1 ? "make all ranks of the group call the same verbs in the same order"
                           : "compare the layouts that the two ranks compute"});
}

// Both sides of a message show their cards.
void MpiCommunicator::compare_message(const Call& call) {
  const auto peer = static_cast<size_t>(call.peer);
  const Card own = card_for(call, call.peer);
  Card other;
  transport_.move({{ranks_[peer], bytes_of(&own), sizeof(Card)}},
                  {{ranks_[peer], bytes_of(&other), sizeof(Card)}}, tag_, false, describe(call));
  const bool sends = call.verb == Verb::kSend;
  const auto answer = static_cast<int32_t>(sends ? Verb::kReceive : Verb::kSend);
  const bool fit = sends ? is_share(own.sends, own.sends_dtype, other.expects, other.expects_dtype)
                         : is_share(own.expects, own.expects_dtype, other.sends, other.sends_dtype);
  if (other.verb == answer && fit && own.call == other.call && own.group == other.group) return;
  throw Error(ErrorInfo{.code = ErrorCode::kMismatch,
                        .what = "A send and its receive do not agree.",
                        .entry = "group " + name_,
                        .expected = tell(other, call.peer),
                        .found = tell(own, member_),
                        .next = "compare the shapes that the two ranks compute"});
}

// source[p] to member p, target[p] from it.
void MpiCommunicator::exchange_parts(const Call& call, std::span<const ConstBuffer> source,
                                     std::span<const Buffer> target) {
  std::vector<MpiSend> sends;
  std::vector<MpiReceive> receives;
  for (size_t p = 0; p < ranks_.size(); ++p) {
    if (static_cast<int>(p) == member_) continue;
    if (source[p].count > 0) sends.push_back({ranks_[p], source[p].data, source[p].size_bytes()});
    if (target[p].count > 0)
      receives.push_back({ranks_[p], target[p].data, target[p].size_bytes()});
  }
  transport_.move(sends, receives, tag_ + 2, false, describe(call));
}

// What all members have for this one, reduced in their order. source[p] is for member p.
std::vector<std::byte> MpiCommunicator::reduced(const Call& call,
                                                std::span<const ConstBuffer> source,
                                                int64_t count) {
  const size_t n = ranks_.size();
  const DType dtype = source[0].dtype;
  const auto part = static_cast<size_t>(count * item_size_bytes(dtype));
  std::vector<std::byte> parts(part * n);
  std::vector<Buffer> places;
  for (size_t p = 0; p < n; ++p) places.push_back({dtype, parts.data() + p * part, count});
  const auto own = static_cast<size_t>(member_);
  copy(places[own], source[own]);
  exchange_parts(call, source, places);
  for (size_t p = 1; p < n; ++p)
    reduce_into(places[0], {dtype, places[p].data, count}, call.reduction);
  parts.resize(part);
  return parts;
}

void MpiCommunicator::all_reduce(Buffer values, Reduction reduction, CallSite site) {
  const ConstBuffer source{values.dtype, values.data, values.count};
  const Call call{.verb = Verb::kAllReduce,
                  .reduction = reduction,
                  .source = {&source, 1},
                  .target = {&values, 1},
                  .site = site,
                  .number = calls_++};
  if (compare_calls_) compare(call);
  // Each member reduces a block of the elements, then all get all blocks.
  const auto n = static_cast<int64_t>(ranks_.size());
  const int64_t width = item_size_bytes(values.dtype);
  std::vector<Buffer> blocks;
  std::vector<ConstBuffer> parts;
  for (int64_t p = 0; p < n; ++p) {
    const int64_t begin = values.count * p / n, end = values.count * (p + 1) / n;
    blocks.push_back({values.dtype, values.data + begin * width, end - begin});
    parts.push_back({values.dtype, values.data + begin * width, end - begin});
  }
  const Buffer own = blocks[static_cast<size_t>(member_)];
  const std::vector<std::byte> sum = reduced(call, parts, own.count);
  const ConstBuffer result{values.dtype, sum.data(), own.count};
  copy(own, result);
  exchange_parts(call, std::vector<ConstBuffer>(ranks_.size(), result), blocks);
}

void MpiCommunicator::reduce_scatter(std::span<const ConstBuffer> source, Buffer target,
                                     Reduction reduction, CallSite site) {
  CHECK(source.size() == ranks_.size(), "one buffer for each member");
  const Call call{.verb = Verb::kReduceScatter,
                  .reduction = reduction,
                  .source = source,
                  .target = {&target, 1},
                  .site = site,
                  .number = calls_++};
  if (compare_calls_) compare(call);
  const std::vector<std::byte> sum = reduced(call, source, target.count);
  copy(target, {target.dtype, sum.data(), target.count});
}

void MpiCommunicator::all_gather(ConstBuffer source, std::span<const Buffer> target,
                                 CallSite site) {
  CHECK(target.size() == ranks_.size(), "one buffer for each member");
  const Call call{.verb = Verb::kAllGather,
                  .source = {&source, 1},
                  .target = target,
                  .site = site,
                  .number = calls_++};
  if (compare_calls_) compare(call);
  copy(target[static_cast<size_t>(member_)], source);
  exchange_parts(call, std::vector<ConstBuffer>(ranks_.size(), source), target);
}

void MpiCommunicator::all_to_all(std::span<const ConstBuffer> source,
                                 std::span<const Buffer> target, CallSite site) {
  CHECK(source.size() == ranks_.size() && target.size() == source.size(),
        "one buffer for each member");
  const Call call{.verb = Verb::kAllToAll,
                  .source = source,
                  .target = target,
                  .site = site,
                  .number = calls_++};
  if (compare_calls_) compare(call);
  std::vector<ConstBuffer> parts(source.begin(), source.end());
  std::vector<std::vector<std::byte>> kept(parts.size());  // what is exchanged in place
  for (size_t p = 0; p < parts.size(); ++p) {
    if (parts[p].data != target[p].data || static_cast<int>(p) == member_) continue;
    kept[p].assign(parts[p].data, parts[p].data + parts[p].size_bytes());
    parts[p].data = kept[p].data();
  }
  const auto own = static_cast<size_t>(member_);
  copy(target[own], parts[own]);
  exchange_parts(call, parts, target);
}

void MpiCommunicator::broadcast(Buffer values, int root, CallSite site) {
  CHECK(root >= 0 && root < size(), "the root is no member of the group");
  const ConstBuffer source{values.dtype, values.data, values.count};
  const Call call{.verb = Verb::kBroadcast,
                  .peer = root,
                  .source = {&source, 1},
                  .target = {&values, 1},
                  .site = site,
                  .number = calls_++};
  if (compare_calls_) compare(call);
  std::vector<ConstBuffer> parts(ranks_.size());
  std::vector<Buffer> places(ranks_.size());
  if (member_ == root)
    std::ranges::fill(parts, source);
  else
    places[static_cast<size_t>(root)] = values;
  exchange_parts(call, parts, places);
}

void MpiCommunicator::send(ConstBuffer source, int to, CallSite site) {
  CHECK(to >= 0 && to < size() && to != member_, "the receiver is no other member of the group");
  const Call call{.verb = Verb::kSend,
                  .peer = to,
                  .source = {&source, 1},
                  .site = site,
                  .number = sent_[static_cast<size_t>(to)]++};
  if (compare_calls_) compare_message(call);
  transport_.move({{ranks_[static_cast<size_t>(to)], source.data, source.size_bytes()}}, {},
                  tag_ + 3, true, describe(call));
}

void MpiCommunicator::receive(Buffer target, int from, CallSite site) {
  CHECK(from >= 0 && from < size() && from != member_,
        "the sender is no other member of the group");
  const Call call{.verb = Verb::kReceive,
                  .peer = from,
                  .target = {&target, 1},
                  .site = site,
                  .number = received_[static_cast<size_t>(from)]++};
  if (compare_calls_) compare_message(call);
  transport_.move({}, {{ranks_[static_cast<size_t>(from)], target.data, target.size_bytes()}},
                  tag_ + 3, false, describe(call));
}

void MpiCommunicator::barrier(CallSite site) {
  const Call call{.verb = Verb::kBarrier, .site = site, .number = calls_++};
  if (compare_calls_) return compare(call);
  const std::byte word{};
  std::vector<std::byte> words(ranks_.size());
  std::vector<ConstBuffer> parts(ranks_.size(), ConstBuffer{DType::kUInt8, &word, 1});
  std::vector<Buffer> places;
  for (std::byte& place : words) places.push_back({DType::kUInt8, &place, 1});
  exchange_parts(call, parts, places);
}

}  // namespace isoshard::reshard
