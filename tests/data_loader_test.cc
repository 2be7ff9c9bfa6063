// UlyssesSPDataLoaderAdapter on simulated ranks: which sample comes when, what of it, and what is
// refused.
#include <gtest/gtest.h>

#include "core/error.h"
#include "properties/file_bridge.h"
#include "reference/data_loader_adapter.h"

namespace isoshard::reference {
namespace {

LoadedBatch batch_of(const std::vector<int64_t>& ids) {
  const int64_t length = static_cast<int64_t>(ids.size());
  std::vector<int64_t> positions;
  for (int64_t i = 0; i < length; ++i) positions.push_back(i);
  return {{"input_ids", 1, length, ids},
          {"position_ids", 1, length, positions},
          {"labels", 1, length, ids}};
}

// By rank: what it gets until the epoch ends, `epochs` times.
std::vector<std::vector<LoadedBatch>> run(const Topology& topology,
                                          const std::function<BatchLoader(int rank)>& loader,
                                          int epochs = 1) {
  std::vector<std::vector<LoadedBatch>> found(static_cast<size_t>(topology.world()));
  sim::Cluster cluster(topology, {.seed = 3});
  cluster.run([&](sim::Rank& rank) {
    DataLoaderAdapter adapter(loader(rank.number()), &rank.group(GroupKind::kSequence));
    EXPECT_EQ(adapter.size(), loader(rank.number()).size * topology.sequence);
    for (int epoch = 0; epoch < epochs; ++epoch) {
      while (std::optional<LoadedBatch> batch = adapter.next()) {
        found[static_cast<size_t>(rank.number())].push_back(*batch);
      }
    }
  });
  return found;
}

BatchLoader always(const LoadedBatch& batch) {
  return {.batch = [batch](int64_t) { return batch; }, .size = 1};
}

// The vector of DeepSpeed's documentation: ids 1 10 10 10 2 2 over two ranks.
TEST(DataLoaderAdapter, ShiftsLabelsBeforeItCuts) {
  const auto found = run({.sequence = 2}, [](int) {
    return always(batch_of({1, 10, 10, 10, 2, 2}));
  });
  const LoadedBatch first = {{"input_ids", 1, 3, {1, 10, 10}},
                             {"position_ids", 1, 3, {0, 1, 2}},
                             {"shift_labels", 1, 3, {10, 10, 10}}};
  const LoadedBatch second = {{"input_ids", 1, 3, {10, 2, 2}},
                              {"position_ids", 1, 3, {3, 4, 5}},
                              {"shift_labels", 1, 3, {2, 2, -100}}};
  ASSERT_EQ(found[0].size(), 2u);
  EXPECT_EQ(found[0][0], first);
  EXPECT_EQ(found[1][1], second);
}

// What the trainer takes (reference/data.h) is what the adapter makes of a loader a rank: the
// sample of each micro step, the rank's slice of it, its positions and its labels.
TEST(DataLoaderAdapter, IsTheOrderThatIsTrainedOn) {
  constexpr int64_t kWords = 50;
  for (const int ranks : {1, 2, 3, 4}) {
    for (const bool packed : {false, true}) {
      const Topology topology{.data = 2, .sequence = ranks};
      const DataConfig data{.seed = 7,
                            .sequence_length = 4 * ranks,
                            .batch = topology.world(),
                            .packed = packed,
                            .masked = 0};
      const auto loader = [&](int rank) {
        return BatchLoader{.batch =
                               [&, rank](int64_t) {
                                 LoadedBatch batch = {{"input_ids", 1, data.sequence_length, {}},
                                                      {"position_ids", 1, data.sequence_length, {}},
                                                      {"labels", 1, data.sequence_length, {}}};
                                 for (int64_t i = 0; i < data.sequence_length; ++i) {
                                   const int64_t token = token_of(data, kWords, rank, i);
                                   const int64_t position = position_of(data, rank, i);
                                   batch[0].values.push_back(token);
                                   batch[1].values.push_back(position);
                                   // The shift takes it for the token before: none across
                                   // documents.
                                   batch[2].values.push_back(position == 0 ? kIgnored : token);
                                 }
                                 return batch;
                               },
                           .size = 1};
      };
      const auto found = run(topology, loader);
      const BatchPlan plan = plan_batch(data, topology.data);
      for (int rank = 0; rank < topology.world(); ++rank) {
        const Coordinate at = coordinate_of(topology, rank);
        const Span own = positions_of(data, ranks, at.sequence);
        const auto& mine = found[static_cast<size_t>(rank)];
        ASSERT_EQ(mine.size(), plan[static_cast<size_t>(at.data)].size());
        for (size_t call = 0; call < mine.size(); ++call) {
          ASSERT_EQ(plan[static_cast<size_t>(at.data)][call].size(), 1u);
          const int64_t sample = plan[static_cast<size_t>(at.data)][call][0];
          for (int64_t i = own.begin; i < own.end; ++i) {
            const size_t k = static_cast<size_t>(i - own.begin);
            EXPECT_EQ(mine[call][0].values.at(k), token_of(data, kWords, sample, i));
            EXPECT_EQ(mine[call][1].values.at(k), position_of(data, sample, i));
            EXPECT_EQ(mine[call][2].values.at(k), label_of(data, kWords, sample, i));
          }
          EXPECT_EQ(mine[call][0].length, own.size());
        }
      }
    }
  }
}

// Call i of group n has the sample n·P + i, of whatever length, and each epoch again.
TEST(DataLoaderAdapter, EverySampleComesOnceAnEpoch) {
  for (const int ranks : {1, 2, 3, 4}) {
    const Topology topology{.data = 2, .sequence = ranks};
    const auto sample = [&](int rank, int64_t number) {
      const int64_t length = ranks * (1 + (rank + number) % 3);
      std::vector<int64_t> ids;
      for (int64_t i = 0; i < length; ++i) ids.push_back(1000 * rank + 100 * number + i);
      return ids;
    };
    const auto found = run(
        topology,
        [&](int rank) {
          return BatchLoader{
              .batch = [&, rank](int64_t number) { return batch_of(sample(rank, number)); },
              .size = 2};
        },
        2);
    for (int rank = 0; rank < topology.world(); ++rank) {
      const auto& mine = found[static_cast<size_t>(rank)];
      ASSERT_EQ(mine.size(), static_cast<size_t>(2 * 2 * ranks));
      for (size_t call = 0; call < mine.size(); ++call) {
        const int64_t number = static_cast<int64_t>(call) / ranks % 2;
        const int owner = rank / ranks * ranks + static_cast<int>(call) % ranks;
        const std::vector<int64_t> whole = sample(owner, number);
        const int64_t share = static_cast<int64_t>(whole.size()) / ranks;
        const auto begin = whole.begin() + rank % ranks * share;
        EXPECT_EQ(mine[call][0].values, std::vector<int64_t>(begin, begin + share));
      }
    }
  }
}

std::string refusal(const std::function<LoadedBatch(int rank)>& batch) {
  try {
    run({.sequence = 2}, [&](int rank) { return always(batch(rank)); });
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(DataLoaderAdapter, RefusesWhatDeepSpeedRefuses) {
  const auto without = [](const std::string& key) {
    return [key](int) {
      LoadedBatch batch = batch_of({1, 2, 3, 4});
      std::erase_if(batch, [&](const BatchColumn& one) { return one.key == key; });
      return batch;
    };
  };
  EXPECT_NE(refusal(without("position_ids")).find("DeepSpeed: ValueError"), std::string::npos);
  EXPECT_NE(refusal(without("input_ids")).find("DeepSpeed: KeyError"), std::string::npos);
  EXPECT_NE(refusal(without("labels")).find("DeepSpeed: KeyError"), std::string::npos);
  EXPECT_NE(refusal([](int rank) {
              return batch_of(rank == 0 ? std::vector<int64_t>{1, 2} : std::vector<int64_t>{1});
            }).find("1 mod 2 is 1"),
            std::string::npos);
  EXPECT_NE(refusal([](int) {
              LoadedBatch batch = batch_of({1, 2});
              batch[2] = {"labels", 1, 1, {7}};
              return batch;
            }).find("several lengths"),
            std::string::npos);
}

TEST(DataLoaderAdapter, AnEmptySampleIsEmpty) {
  const auto found = run({.sequence = 2}, [](int) { return always(batch_of({})); });
  EXPECT_EQ(found[1][0][2], (BatchColumn{"shift_labels", 1, 0, {}}));
}

// Loaders of two lengths let DeepSpeed hang; here the ranks that wait are named.
TEST(DataLoaderAdapter, UnequalLoadersAreADeadlockThatIsTold) {
  try {
    run({.sequence = 2}, [](int rank) {
      BatchLoader loader = always(batch_of({1, 2}));
      loader.size = 1 + rank;
      return loader;
    });
    FAIL() << "nobody waits";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("rank 1 waits for rank 0"), std::string::npos)
        << error.what();
  }
}

}  // namespace
}  // namespace isoshard::reference
