// Plans between every two topologies and stages of up to 8 ranks, all of them.
#include <gtest/gtest.h>

#include <atomic>
#include <iostream>
#include <mutex>
#include <numeric>
#include <set>
#include <thread>

#include "core/threads.h"
#include "properties/topology_plans.h"
#include "properties/training_laws.h"

namespace isoshard::properties {
namespace {

// Under sanitizers every 40th pair.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr size_t kStride = 40;
#else
constexpr size_t kStride = 1;
#endif

// Both ends share `experts` experts, the fewest that both can share.
struct Sweep {
  std::atomic<size_t> pairs{0}, done{0};
  std::mutex mutex;
  std::string reason;

  void run(int experts) {
    const TopologyPlans plans(8, experts);
    std::atomic<size_t> next{0};
    const auto work = [&] {
      for (size_t from = next++; from < plans.size(); from = next++) {
        for (size_t to = 0; to < plans.size(); ++to) {
          const int a = plans.leg(from).topology.expert, b = plans.leg(to).topology.expert;
          if (std::lcm(a, b) != experts || ++pairs % kStride != 0) continue;
          const std::string found = plans.difference(from, to, false);
          ++done;
          if (found.empty()) continue;
          const std::lock_guard<std::mutex> lock(mutex);
          if (reason.empty()) reason = found;
        }
      }
    };
    std::vector<std::thread> threads;
    try_start(&threads, work);
    work();
    for (std::thread& thread : threads) thread.join();
  }
};

TEST(Pairs, EveryTopologyIsPlannedToEveryOther) {
  std::set<int> numbers;
  for (int a = 1; a <= 8; ++a) {
    for (int b = 1; b <= 8; ++b) numbers.insert(std::lcm(a, b));
  }
  Sweep sweep;
  for (const int experts : numbers) sweep.run(experts);
  EXPECT_EQ(sweep.pairs, 274576u);
  EXPECT_EQ(sweep.reason, "");
  std::cout << sweep.done << " of " << sweep.pairs << " plans\n";
}

}  // namespace

std::string every_topology_is_planned(const Draw& draw, TrainingMutant mutant) {
  static const TopologyPlans plans(8, 8);
  const int64_t last = static_cast<int64_t>(plans.size()) - 1;
  const size_t from = static_cast<size_t>(draw(0, last)), to = static_cast<size_t>(draw(0, last));
  return plans.difference(from, to, mutant == TrainingMutant::kSkewedPlan);
}

}  // namespace isoshard::properties
