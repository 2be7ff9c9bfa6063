// Calls that do not agree: reported at the call, on the rank that comes second, with both ranks and
// call sites, while a third rank has not come.
#include <gtest/gtest.h>

#include <functional>
#include <set>
#include <string>
#include <vector>

#include "core/error.h"
#include "sim/caught.h"
#include "sim/cluster.h"

namespace isoshard::sim {
namespace {

using Body = std::function<void(Rank&)>;

template <typename T>
void reduce(Rank& rank, Reduction reduction, GroupKind kind = GroupKind::kWorld, int count = 1,
            CallSite site = CallSite::current()) {
  std::vector<T> values(static_cast<size_t>(count));
  rank.group(kind).all_reduce(buffer(std::span<T>(values)), reduction, site);
}

template <typename T>
void send(Rank& rank, int count, int to, CallSite site = CallSite::current()) {
  const std::vector<T> values(static_cast<size_t>(count));
  rank.group(GroupKind::kWorld).send(const_buffer(std::span<const T>(values)), to, site);
}

template <typename T>
void receive(Rank& rank, int count, int from, GroupKind kind = GroupKind::kWorld,
             CallSite site = CallSite::current()) {
  std::vector<T> values(static_cast<size_t>(count));
  rank.group(kind).receive(buffer(std::span<T>(values)), from, site);
}

void broadcast(Rank& rank, int root, CallSite site = CallSite::current()) {
  float value = 0;
  rank.group(GroupKind::kWorld).broadcast(buffer(std::span(&value, 1)), root, site);
}

std::set<std::string> call_sites(const std::string& text) {
  const std::string file = "mismatch_test.cc:";
  std::set<std::string> sites;
  for (size_t at = text.find(file); at != std::string::npos; at = text.find(file, at + 1)) {
    const size_t end = text.find_first_not_of("0123456789", at + file.size());
    sites.insert(text.substr(at, end - at));
  }
  return sites;
}

// Rank 0 does one thing, rank 1 another, ranks 2 and 3 nothing; whoever comes first.
void expect_told(const Body& zero, const Body& one, const std::vector<std::string>& words) {
  for (uint64_t seed = 1; seed <= 8; ++seed) {
    Cluster cluster({.data = 2, .sequence = 2}, {.seed = seed});
    const Error error = caught(cluster, [&](Rank& rank) {
      if (rank.number() == 0) zero(rank);
      if (rank.number() == 1) one(rank);
    });
    const std::string text = error.what();
    EXPECT_EQ(error.info().code, ErrorCode::kMismatch) << text;
    EXPECT_TRUE(error.info().what.starts_with("On rank ")) << text;  // at a call, not at the end
    const std::string both = error.info().expected + "\n" + error.info().found;
    EXPECT_NE(both.find("rank 0"), std::string::npos) << text;
    EXPECT_NE(both.find("rank 1"), std::string::npos) << text;
    for (const std::string& word : words) EXPECT_NE(both.find(word), std::string::npos) << text;
    EXPECT_EQ(call_sites(both).size(), 2u) << text;
  }
}

TEST(Mismatch, Verb) {
  expect_told([](Rank& rank) { reduce<float>(rank, Reduction::kSum); },
              [](Rank& rank) { rank.group(GroupKind::kWorld).barrier(); },
              {"all_reduce", "barrier"});
}

TEST(Mismatch, Order) {
  expect_told(
      [](Rank& rank) {
        broadcast(rank, 0);
        reduce<float>(rank, Reduction::kSum);
      },
      [](Rank& rank) {
        reduce<float>(rank, Reduction::kSum);
        broadcast(rank, 0);
      },
      {"all_reduce", "broadcast"});
}

TEST(Mismatch, DType) {
  expect_told([](Rank& rank) { reduce<float>(rank, Reduction::kSum); },
              [](Rank& rank) { reduce<int64_t>(rank, Reduction::kSum); }, {"float32", "int64"});
}

TEST(Mismatch, Root) {
  const Body zero = [](Rank& rank) { broadcast(rank, 0); };
  const Body one = [](Rank& rank) { broadcast(rank, 1); };
  expect_told(zero, one, {"from root 0", "from root 1"});
}

TEST(Mismatch, Reduction) {
  expect_told([](Rank& rank) { reduce<float>(rank, Reduction::kSum); },
              [](Rank& rank) { reduce<float>(rank, Reduction::kMax); }, {"sum", "maximum"});
}

TEST(Mismatch, Count) {
  expect_told([](Rank& rank) { reduce<float>(rank, Reduction::kSum, GroupKind::kWorld, 3); },
              [](Rank& rank) { reduce<float>(rank, Reduction::kSum, GroupKind::kWorld, 4); },
              {"3 elements", "4 elements"});
}

TEST(Mismatch, Group) {
  expect_told([](Rank& rank) { reduce<float>(rank, Reduction::kSum); },
              [](Rank& rank) { reduce<float>(rank, Reduction::kSum, GroupKind::kSequence); },
              {"rank 0 waits for ranks 1,2,3", "rank 1 waits for rank 0", "group world",
               "group " + std::string(name(GroupKind::kSequence)) + " 0,1"});
}

// One buffer of several: an all_to_all whose first ones agree.
TEST(Mismatch, DTypeOfOneBuffer) {
  const auto exchange_with = [](bool wrong, CallSite site) {
    return [=](Rank& rank) {
      float a[4] = {};
      int32_t b = 0;
      std::vector<ConstBuffer> source;
      std::vector<Buffer> target;
      for (float& value : a) {
        source.push_back(const_buffer(std::span<const float>(&value, 1)));
        target.push_back(buffer(std::span(&value, 1)));
      }
      if (wrong) target[1] = buffer(std::span(&b, 1));
      rank.group(GroupKind::kWorld).all_to_all(source, target, site);
    };
  };
  const Body zero = exchange_with(true, CallSite::current());
  const Body one = exchange_with(false, CallSite::current());
  expect_told(zero, one,
              {"rank 0 expects 1 elements of int32 from rank 1", "1 elements of float32"});
}

TEST(Mismatch, CountOfASend) {
  expect_told([](Rank& rank) { send<float>(rank, 2, 1); },
              [](Rank& rank) { receive<float>(rank, 3, 0); }, {"2 float32", "3 float32"});
}

TEST(Mismatch, DTypeOfASend) {
  expect_told([](Rank& rank) { send<float>(rank, 2, 1); },
              [](Rank& rank) { receive<int32_t>(rank, 2, 0); }, {"2 float32", "2 int32"});
}

TEST(Mismatch, GroupOfASend) {
  expect_told([](Rank& rank) { send<float>(rank, 1, 1); },
              [](Rank& rank) { receive<float>(rank, 1, 0, GroupKind::kSequence); },
              {"rank 0 waits for rank 1 in send", "rank 1 waits for rank 0 in receive"});
}

TEST(Mismatch, ASendAgainstACollective) {
  expect_told([](Rank& rank) { send<float>(rank, 1, 1); },
              [](Rank& rank) { rank.group(GroupKind::kWorld).barrier(); }, {"send", "barrier"});
}

TEST(Mismatch, BothSend) {
  expect_told([](Rank& rank) { send<float>(rank, 1, 1); },
              [](Rank& rank) { send<float>(rank, 1, 0); },
              {"rank 0 waits for rank 1 in send", "rank 1 waits for rank 0 in send"});
}

// A circle of three has no two that wait for each other: it is found once nobody can go on.
TEST(Mismatch, ACircleOfThreeIsADeadlockWithAllNames) {
  Cluster cluster({.data = 3});
  const Error error =
      caught(cluster, [](Rank& rank) { send<float>(rank, 1, (rank.number() + 1) % 3); });
  EXPECT_EQ(error.info().code, ErrorCode::kMismatch);
  for (const char* words : {"rank 0 waits for rank 1", "rank 1 waits for rank 2",
                            "rank 2 waits for rank 0", "mismatch_test.cc:"}) {
    EXPECT_NE(error.info().found.find(words), std::string::npos) << error.what();
  }
}

// A large group with one count for all: compared at the call, though one rank never comes.
TEST(Mismatch, OneCountOfALargeGroup) {
  Cluster cluster({.data = 80}, {.seed = 3});
  const Error error = caught(cluster, [&](Rank& rank) {
    if (rank.number() == 79) return;
    reduce<float>(rank, Reduction::kSum, GroupKind::kWorld, rank.number() == 41 ? 4 : 3);
  });
  EXPECT_EQ(error.info().code, ErrorCode::kMismatch);
  EXPECT_TRUE(error.info().what.starts_with("On rank ")) << error.what();
  EXPECT_NE((error.info().expected + error.info().found).find("4 elements of float32"),
            std::string::npos)
      << error.what();
}

// A large group whose counts are each pair's own: compared once, when the last rank comes.
TEST(Mismatch, OnePairOfALargeGroup) {
  constexpr int kRanks = 80;
  const auto exchange = [](Rank& rank, int wrong_sender) {
    std::vector<std::vector<int64_t>> sent, received;
    std::vector<ConstBuffer> sources;
    std::vector<Buffer> targets;
    for (int other = 0; other < kRanks; ++other) {
      const bool wrong = rank.number() == wrong_sender && other == 7;
      sent.emplace_back(static_cast<size_t>((rank.number() * other) % 5 + wrong), rank.number());
      received.emplace_back(static_cast<size_t>((rank.number() * other) % 5));
    }
    for (const auto& values : sent) {
      sources.push_back(const_buffer(std::span<const int64_t>(values)));
    }
    for (auto& values : received) targets.push_back(buffer(std::span<int64_t>(values)));
    rank.group(GroupKind::kWorld).all_to_all(sources, targets);
    for (int other = 0; other < kRanks; ++other) {
      for (const int64_t value : received[static_cast<size_t>(other)]) EXPECT_EQ(value, other);
    }
  };
  Cluster good({.data = kRanks}, {.seed = 3});
  good.run([&](Rank& rank) { exchange(rank, -1); });
  for (const int sender : {0, 41, 79}) {
    Cluster cluster({.data = kRanks}, {.seed = 3});
    const Error error = caught(cluster, [&](Rank& rank) { exchange(rank, sender); });
    EXPECT_EQ(error.info().code, ErrorCode::kMismatch);
    EXPECT_NE(error.info().expected.find("rank 7 expects"), std::string::npos) << error.what();
    EXPECT_NE(error.info().found.find("rank " + std::to_string(sender) + " hands over"),
              std::string::npos)
        << error.what();
  }
}

}  // namespace
}  // namespace isoshard::sim
