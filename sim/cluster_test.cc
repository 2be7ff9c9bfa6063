#include "sim/cluster.h"

#include <gtest/gtest.h>

#include <array>
#include <numeric>

#include "core/check.h"
#include "core/error.h"
#include "sim/caught.h"

namespace isoshard::sim {
namespace {

int64_t summed(Rank& rank, GroupKind kind, int64_t value) {
  rank.group(kind).all_reduce(buffer(std::span(&value, 1)), Reduction::kSum);
  return value;
}

TEST(Cluster, EveryVerbMovesWhatItSays) {
  Cluster cluster({.data = 2, .sequence = 2});
  cluster.run([](Rank& rank) {
    EXPECT_EQ(summed(rank, GroupKind::kWorld, rank.number()), 6);
    EXPECT_EQ(summed(rank, GroupKind::kSequence, rank.number()), rank.number() < 2 ? 1 : 5);
    Communicator& world = rank.group(GroupKind::kWorld);
    std::vector<std::vector<int64_t>> source;
    for (int p = 0; p < 4; ++p) source.push_back(std::vector<int64_t>(p + 1, rank.number()));
    const auto target = exchange(world, source, std::vector<int64_t>(4, rank.number() + 1));
    for (int p = 0; p < 4; ++p) {
      EXPECT_EQ(target[p], std::vector<int64_t>(rank.number() + 1, p));
    }
    float value = rank.number() == 2 ? 7.0f : 0.0f;
    world.broadcast(buffer(std::span(&value, 1)), 2);
    EXPECT_EQ(value, 7.0f);
    std::array<int64_t, 4> all{};
    std::vector<Buffer> places;
    for (int64_t& place : all) places.push_back(buffer(std::span(&place, 1)));
    const int64_t own = rank.number() * 10;
    world.all_gather(const_buffer(std::span(&own, 1)), places);
    EXPECT_EQ(all, (std::array<int64_t, 4>{0, 10, 20, 30}));
    std::array<int64_t, 4> terms{1, 2, 3, 4};
    std::vector<ConstBuffer> shares;
    for (const int64_t& term : terms) shares.push_back(const_buffer(std::span(&term, 1)));
    int64_t sum = 0;
    world.reduce_scatter(shares, buffer(std::span(&sum, 1)), Reduction::kSum);
    EXPECT_EQ(sum, 4 * (rank.number() + 1));
    Communicator& pair = rank.group(GroupKind::kSequence);
    int64_t message = rank.number();
    if (pair.rank() == 0) {
      pair.send(const_buffer(std::span<const int64_t>(&message, 1)), 1);
    } else {
      pair.receive(buffer(std::span(&message, 1)), 0);
      EXPECT_EQ(message, rank.number() - 1);
    }
    world.barrier();
  });
  EXPECT_EQ(cluster.trace().events().size(), 4u * 8);
}

TEST(Cluster, TheSeedIsTheRun) {
  const auto hash = [](uint64_t seed) {
    Cluster cluster({.data = 5}, {.seed = seed});
    cluster.run([](Rank& rank) {
      for (int i = 0; i < 4; ++i) summed(rank, GroupKind::kWorld, i);
    });
    return cluster.trace().hash();
  };
  EXPECT_EQ(hash(7), hash(7));
  EXPECT_NE(hash(7), hash(8));
}

TEST(Cluster, ASaveBehindRankZeroIsADeadlockWithNames) {
  Cluster cluster({.data = 3});
  const Error error = caught(cluster, [](Rank& rank) {
    if (rank.number() == 0) rank.group(GroupKind::kWorld).barrier();
  });
  EXPECT_EQ(error.info().code, ErrorCode::kMismatch);
  EXPECT_NE(error.info().found.find("rank 0 waits for ranks 1,2 in barrier"), std::string::npos);
  EXPECT_NE(error.info().found.find("cluster_test.cc:"), std::string::npos);
  EXPECT_NE(error.info().found.find("ended: rank 1,2"), std::string::npos);
}

TEST(Cluster, DifferentVerbsNameBothCallSites) {
  Cluster cluster({.data = 2});
  const Error error = caught(cluster, [](Rank& rank) {
    if (rank.number() == 0)
      rank.group(GroupKind::kWorld).barrier();
    else
      summed(rank, GroupKind::kWorld, 1);
  });
  EXPECT_EQ(error.info().code, ErrorCode::kMismatch);
  const std::string both = error.info().expected + error.info().found;
  EXPECT_NE(both.find("barrier"), std::string::npos);
  EXPECT_NE(both.find("all_reduce"), std::string::npos);
}

TEST(Cluster, CountsAreComparedOnBothSides) {
  Cluster cluster({.data = 2});
  const Error error = caught(cluster, [](Rank& rank) {
    const std::vector<std::vector<float>> source(2, std::vector<float>(3));
    exchange(rank.group(GroupKind::kWorld), source, {3, rank.number() == 0 ? 2 : 3});
  });
  EXPECT_NE(error.info().expected.find("rank 0 expects 2 elements of float32 from rank 1"),
            std::string::npos);
}

TEST(Cluster, ADeadRankIsNamedAndNobodyWaits) {
  for (const FaultKind kind :
       {FaultKind::kDieBefore, FaultKind::kDieInside, FaultKind::kDieAfter}) {
    Cluster cluster({.data = 3}, {.faults = {{.kind = kind, .rank = 1, .operation = 2}}});
    const Error error = caught(cluster, [](Rank& rank) {
      for (int i = 0; i < 5; ++i) summed(rank, GroupKind::kWorld, i);
    });
    EXPECT_EQ(error.info().code, ErrorCode::kInterrupted);
    EXPECT_EQ(error.info().entry, "rank 1 died");
    EXPECT_EQ(cluster.dead(), std::vector<int>{1});
  }
}

TEST(Cluster, ACorruptedMessageArrivesAndASlowRankChangesNothing) {
  Cluster corrupt({.data = 2}, {.faults = {{FaultKind::kCorrupt, 1, 0, 3}}});
  corrupt.run([](Rank& rank) { EXPECT_EQ(summed(rank, GroupKind::kWorld, 0), 8); });
  Cluster slow({.data = 4}, {.faults = {{FaultKind::kSlow, 2, 0, 0}}});
  slow.run([](Rank& rank) {
    for (int i = 0; i < 9; ++i) EXPECT_EQ(summed(rank, GroupKind::kWorld, i), 4 * i);
  });
}

TEST(Cluster, AFailureOfOneRankIsThrownAndOthersUnwind) {
  Cluster cluster({.data = 4});
  int unwound = 0;
  const Error error = caught(cluster, [&](Rank& rank) {
    struct Guard {
      int* count;
      ~Guard() { ++*count; }
    } guard{&unwound};
    if (rank.number() == 3) throw Error(ErrorCode::kNoSpace, "disk full");
    rank.group(GroupKind::kWorld).barrier();
  });
  EXPECT_EQ(error.info().what, "On rank 3: disk full");
  EXPECT_EQ(unwound, 4);
}

TEST(Cluster, AThousandRanks) {
  Cluster cluster({.data = 1024}, {.stack_bytes = 64 * 1024});
  cluster.run([](Rank& rank) { EXPECT_EQ(summed(rank, GroupKind::kWorld, 1), 1024); });
}

}  // namespace
}  // namespace isoshard::sim
