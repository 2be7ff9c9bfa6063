// Each fault of a message, on runs of all verbs whose values are known without it: the same bits,
// or an error that names ranks.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>

#include "core/error.h"
#include "core/random.h"
#include "sim/caught.h"
#include "sim/cluster.h"

namespace isoshard::sim {
namespace {

constexpr Topology kFour{.data = 2, .sequence = 2};
using Values = std::vector<std::vector<float>>;  // what each rank has heard, in its own order

void send(Communicator& group, float value, int to) {
  group.send(const_buffer(std::span<const float>(&value, 1)), to);
}

float receive(Communicator& group, int from) {
  float value = -1;
  group.receive(buffer(std::span(&value, 1)), from);
  return value;
}

// A word of every verb; the sums depend on the order of their terms.
void talk(Rank& rank, std::vector<float>* heard) {
  Communicator& world = rank.group(GroupKind::kWorld);
  const int number = rank.number(), next = (number + 1) % 4, last = (number + 3) % 4;
  float sum = number % 2 == 0 ? 1e8f : 3.0f + static_cast<float>(number);
  world.all_reduce(buffer(std::span(&sum, 1)), Reduction::kSum);
  heard->push_back(sum);
  for (int round = 0; round < 2; ++round) {
    const float value = sum + static_cast<float>(10 * number + round);
    if (number % 2 == 0) send(world, value, next);
    heard->push_back(receive(world, last));
    if (number % 2 == 1) send(world, value, next);
  }
  std::vector<std::vector<float>> parts(4, {heard->back(), static_cast<float>(number)});
  for (const auto& part : exchange(world, parts, {2, 2, 2, 2})) {
    heard->insert(heard->end(), part.begin(), part.end());
  }
  Communicator& pair = rank.group(GroupKind::kSequence);
  float root = heard->back() * 3;
  pair.broadcast(buffer(std::span(&root, 1)), 1);
  std::vector<float> both(2);
  const Buffer places[] = {buffer(std::span(both).first(1)), buffer(std::span(both).last(1))};
  pair.all_gather(const_buffer(std::span<const float>(&root, 1)), places);
  const ConstBuffer terms[] = {const_buffer(std::span<const float>(both).first(1)),
                               const_buffer(std::span<const float>(both).last(1))};
  pair.reduce_scatter(terms, buffer(std::span(&root, 1)), Reduction::kMax);
  heard->push_back(root);
  world.barrier();
}
constexpr int64_t kCalls = 10;  // of each rank

struct Outcome {
  Values values = Values(4);
  std::vector<FaultKind> struck;
  uint64_t trace = 0;
};

Outcome talked(uint64_t seed, const Faults& faults) {
  Outcome outcome;
  Cluster cluster(kFour, {.seed = seed, .faults = faults});
  cluster.run([&](Rank& rank) {
    talk(rank, &outcome.values[static_cast<size_t>(rank.number())]);
    EXPECT_EQ(rank.operations(), kCalls);
  });
  outcome.struck = cluster.struck();
  outcome.trace = cluster.trace().hash();
  return outcome;
}

// Returns how many of the runs went another way than without the fault.
int same_values_at_every_call(const Fault& fault) {
  int other_ways = 0;
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    const Outcome plain = talked(seed, {});
    for (int rank = 0; rank < 4; ++rank) {
      for (int64_t at = 0; at < kCalls; ++at) {
        Fault placed = fault;
        placed.rank = rank, placed.operation = at;
        const Outcome found = talked(seed, {placed});
        EXPECT_EQ(found.values, plain.values) << name(fault.kind) << " at " << at << " of " << rank;
        EXPECT_EQ(found.struck, std::vector<FaultKind>{fault.kind});
        EXPECT_EQ(found.trace, talked(seed, {placed}).trace);
        other_ways += found.trace != plain.trace;
      }
    }
  }
  return other_ways;
}

TEST(MessageFaults, ADelayChangesTheOrderOfEventsAndNoValue) {
  for (const uint64_t turns : {0, 1, 4, 30, 1'000'000}) {
    const int found = same_values_at_every_call({.kind = FaultKind::kDelay, .choice = turns});
    EXPECT_GT(found, 60) << turns << " turns, of 120 runs";
  }
}

TEST(MessageFaults, AnOvertakenCallChangesTheOrderOfEventsAndNoValue) {
  EXPECT_GT(same_values_at_every_call({.kind = FaultKind::kReorder}), 60);
}

TEST(MessageFaults, SeveralAtOnceChangeNoValueEither) {
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    isoshard::Random random(seed);
    Faults faults;
    for (int i = 0; i < 8; ++i) {
      const FaultKind kinds[] = {FaultKind::kDelay, FaultKind::kReorder, FaultKind::kDuplicate,
                                 FaultKind::kSlow};
      faults.push_back({.kind = kinds[random.below(4)],
                        .rank = static_cast<int>(random.below(4)),
                        .operation = random.below(kCalls),
                        .choice = static_cast<uint64_t>(random.below(20))});
    }
    EXPECT_EQ(talked(seed, faults).values, talked(1, {}).values) << "seed " << seed;
  }
}

// Rank 0's message to 1 and rank 2's to 3 are of different channels: either may come first, but
// not once the first is to be overtaken.
TEST(MessageFaults, AnOvertakenMessageComesBehindTheOther) {
  int first = 0;
  for (const bool reorder : {false, true}) {
    for (uint64_t seed = 1; seed <= 30; ++seed) {
      Faults faults;
      if (reorder) faults = {{.kind = FaultKind::kReorder, .rank = 0, .operation = 0}};
      Cluster cluster({.data = 4}, {.seed = seed, .faults = faults});
      bool other_is_sent = false;
      cluster.run([&](Rank& rank) {
        Communicator& world = rank.group(GroupKind::kWorld);
        if (rank.number() == 0) send(world, 5, 1);
        if (rank.number() == 2) {
          other_is_sent = true;
          send(world, 6, 3);
        }
        if (rank.number() == 3) {
          EXPECT_EQ(receive(world, 2), 6);
        }
        if (rank.number() != 1) return;
        EXPECT_EQ(receive(world, 0), 5);
        EXPECT_TRUE(!reorder || other_is_sent) << "seed " << seed;
        first += !other_is_sent;
      });
    }
  }
  EXPECT_GT(first, 0);
}

// Rank 0 sends to 1 while 2 and 3 exchange 200 messages; returns how many of those were sent when
// the one arrived.
int sent_before_it(const Fault& fault, uint64_t seed, CollectiveTrace* trace) {
  Cluster cluster({.data = 4}, {.seed = seed, .faults = {fault}});
  int sent = 0, before = 0;
  cluster.run([&](Rank& rank) {
    Communicator& world = rank.group(GroupKind::kWorld);
    if (rank.number() == 0) send(world, 5, 1);
    if (rank.number() == 1) receive(world, 0), before = sent;
    for (int i = 0; i < 200 && rank.number() == 2; ++i) ++sent, send(world, 6, 3);
    for (int i = 0; i < 200 && rank.number() == 3; ++i) receive(world, 2);
  });
  *trace = cluster.trace();
  return before;
}

TEST(MessageFaults, ADelayLastsItsTurnsAndAnOvertakenCallOneOfTheOthers) {
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    CollectiveTrace trace;
    sent_before_it({.kind = FaultKind::kDelay, .choice = 100}, seed, &trace);
    for (const TraceEvent& event : trace.events()) {
      EXPECT_TRUE(event.rank != 0 || event.end >= event.begin + 100) << "seed " << seed;
    }
    const int before = sent_before_it({.kind = FaultKind::kReorder}, seed, &trace);
    EXPECT_TRUE(before >= 1 && before < 50) << before << ", seed " << seed;
  }
}

TEST(MessageFaults, AMessageThatNothingOvertakesComesAllTheSame) {
  Cluster cluster({.data = 2},
                  {.faults = {{.kind = FaultKind::kReorder, .rank = 0, .operation = 0}}});
  cluster.run([](Rank& rank) {
    Communicator& world = rank.group(GroupKind::kWorld);
    if (rank.number() == 0) {
      send(world, 5, 1);
    } else {
      EXPECT_EQ(receive(world, 0), 5);
    }
  });
}

// Rank 0 sends 1, 2, 3 to rank 1, which hears what `heard` gets.
Error three_messages(uint64_t seed, const Faults& faults, std::vector<float>* heard,
                     std::vector<FaultKind>* struck = nullptr) {
  Cluster cluster({.data = 2}, {.seed = seed, .faults = faults});
  const Error error = caught(cluster, [&](Rank& rank) {
    Communicator& world = rank.group(GroupKind::kWorld);
    for (int i = 1; i <= 3; ++i) {
      if (rank.number() == 0)
        send(world, static_cast<float>(i), 1);
      else
        heard->push_back(receive(world, 0));
    }
  });
  if (struck != nullptr) *struck = cluster.struck();
  return error;
}
const std::vector<float> kThree{1, 2, 3};

TEST(MessageFaults, AChannelKeepsItsOrder) {
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    for (const FaultKind kind : {FaultKind::kDelay, FaultKind::kReorder}) {
      std::vector<float> heard;
      three_messages(seed, {{.kind = kind, .rank = 0, .operation = 0, .choice = 9}}, &heard);
      EXPECT_EQ(heard, kThree);
    }
  }
}

TEST(MessageFaults, AMessageThatComesTwiceIsHeardOnce) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    for (int64_t at = 0; at < 3; ++at) {
      std::vector<float> heard;
      std::vector<FaultKind> struck;
      const Fault fault{.kind = FaultKind::kDuplicate, .rank = 0, .operation = at};
      const Error error = three_messages(seed, {fault}, &heard, &struck);
      EXPECT_EQ(error.info().what, "nothing was thrown");
      EXPECT_EQ(heard, kThree) << "message " << at << ", seed " << seed;
      EXPECT_EQ(struck, std::vector<FaultKind>{FaultKind::kDuplicate});
    }
    std::vector<float> heard;
    Faults all;
    for (int64_t at = 0; at < 3; ++at) {
      all.push_back({.kind = FaultKind::kDuplicate, .rank = 0, .operation = at});
    }
    three_messages(seed, all, &heard);
    EXPECT_EQ(heard, kThree);
  }
}

// The last of the messages: nobody can tell from a gap, and the receiver waits.
TEST(MessageFaults, ALostMessageIsNamedWhereItsReceiverWaits) {
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    std::vector<float> heard;
    std::vector<FaultKind> struck;
    const Error error = three_messages(
        seed, {{.kind = FaultKind::kDrop, .rank = 0, .operation = 2}}, &heard, &struck);
    EXPECT_EQ(error.info().code, ErrorCode::kMismatch);
    EXPECT_EQ(heard, (std::vector<float>{1, 2}));
    EXPECT_EQ(struck, std::vector<FaultKind>{FaultKind::kDrop});
    const std::string& found = error.info().found;
    EXPECT_NE(found.find("rank 1 waits for rank 0 in receive"), std::string::npos) << found;
    EXPECT_NE(found.find("whose message was lost: rank 0: send"), std::string::npos) << found;
    EXPECT_NE(found.find("(call 2 of group world"), std::string::npos) << found;
  }
}

// An earlier one: what comes next is never taken for it.
TEST(MessageFaults, AGapBetweenMessagesIsReportedBeforeAValueIsTaken) {
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    for (int64_t at = 0; at < 2; ++at) {
      std::vector<float> heard;
      const Fault fault{.kind = FaultKind::kDrop, .rank = 0, .operation = at};
      const Error error = three_messages(seed, {fault}, &heard);
      EXPECT_EQ(error.info().code, ErrorCode::kMismatch);
      EXPECT_NE(error.info().what.find("was lost"), std::string::npos) << error.what();
      EXPECT_EQ(heard, std::vector<float>(kThree.begin(), kThree.begin() + at));
      const std::string both = error.info().expected + error.info().found;
      EXPECT_NE(both.find("rank 0: send"), std::string::npos) << both;
      EXPECT_NE(both.find("rank 1: receive"), std::string::npos) << both;
    }
  }
}

TEST(MessageFaults, ALostMessageIsNamedWhereItsSenderGoesOn) {
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    Cluster cluster({.data = 2}, {.seed = seed, .faults = {{FaultKind::kDrop, 0, 0}}});
    const Error error = caught(cluster, [](Rank& rank) {
      Communicator& world = rank.group(GroupKind::kWorld);
      if (rank.number() == 0)
        send(world, 1, 1);
      else
        receive(world, 0);
      world.barrier();
    });
    EXPECT_EQ(error.info().code, ErrorCode::kMismatch);
    const std::string& found = error.info().found;
    EXPECT_NE(found.find("whose message was lost"), std::string::npos) << error.what();
    EXPECT_NE(found.find("rank 0 waits for rank 1 in barrier"), std::string::npos) << error.what();
  }
}

// No receiver can notice it: laws above must find another value.
TEST(MessageFaults, ACorruptedMessageArrivesChangedAndNobodyIsTold) {
  for (uint64_t bit = 0; bit < 32; ++bit) {
    std::vector<float> heard;
    std::vector<FaultKind> struck;
    const Fault fault{.kind = FaultKind::kCorrupt, .rank = 0, .operation = 1, .choice = bit};
    const Error error = three_messages(1, {fault}, &heard, &struck);
    EXPECT_EQ(error.info().what, "nothing was thrown");
    EXPECT_EQ(struck, std::vector<FaultKind>{FaultKind::kCorrupt});
    ASSERT_EQ(heard.size(), 3u);
    EXPECT_EQ(std::bit_cast<uint32_t>(heard[1]), std::bit_cast<uint32_t>(2.0f) ^ (1u << bit));
    EXPECT_EQ(heard[0], 1);
    EXPECT_EQ(heard[2], 3);
  }
}

TEST(MessageFaults, WhatDoesNotFitTheOperationDoesNothing) {
  for (const FaultKind kind :
       {FaultKind::kCorrupt, FaultKind::kDrop, FaultKind::kDuplicate, FaultKind::kDiskFull}) {
    std::vector<float> heard;
    std::vector<FaultKind> struck;
    three_messages(1, {{.kind = kind, .rank = 1, .operation = 0}}, &heard, &struck);  // a receive
    EXPECT_EQ(heard, kThree);
    EXPECT_TRUE(struck.empty()) << name(kind);
  }
}

TEST(MessageFaults, ADeathAtEveryCallOfEveryVerbIsNamed) {
  for (const FaultKind kind :
       {FaultKind::kDieBefore, FaultKind::kDieInside, FaultKind::kDieAfter}) {
    for (int dying = 0; dying < 4; ++dying) {
      for (int64_t at = 0; at < kCalls; ++at) {
        Cluster cluster(kFour, {.faults = {{.kind = kind, .rank = dying, .operation = at}}});
        Values heard(4);
        const Error error = caught(
            cluster, [&](Rank& rank) { talk(rank, &heard[static_cast<size_t>(rank.number())]); });
        EXPECT_EQ(cluster.dead(), std::vector<int>{dying});
        if (kind == FaultKind::kDieAfter && at + 1 == kCalls) continue;  // nobody waits for it
        EXPECT_EQ(error.info().code, ErrorCode::kInterrupted) << error.what();
        EXPECT_EQ(error.info().entry, "rank " + std::to_string(dying) + " died");
      }
    }
  }
}

}  // namespace
}  // namespace isoshard::sim
