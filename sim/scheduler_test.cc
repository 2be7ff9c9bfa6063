#include "sim/scheduler.h"

#include <gtest/gtest.h>

#include <limits>
#include <string>

namespace isoshard::sim {
namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

TEST(Scheduler, APauseLastsSoManyTurns) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    Scheduler scheduler(seed);
    int64_t begin = 0, end = 0;
    scheduler.spawn([&] {
      begin = scheduler.tick();
      scheduler.pause(5);
      end = scheduler.tick();
    });
    scheduler.spawn([&] {
      for (int i = 0; i < 40; ++i) scheduler.pause(0);  // gives up its turn and is ready again
    });
    EXPECT_TRUE(scheduler.run());
    EXPECT_GE(end, begin + 5) << "seed " << seed;
  }
}

TEST(Scheduler, WhereAllPauseTheNearestGoesOn) {
  std::string order;
  Scheduler scheduler(3);
  const int64_t turns[] = {kNever, 2000, 1000};
  for (int task = 0; task < 3; ++task) {
    scheduler.spawn([&, task] {
      scheduler.pause(turns[task]);
      order += std::to_string(task);
    });
  }
  EXPECT_TRUE(scheduler.run());
  EXPECT_EQ(order, "210");
  EXPECT_LT(scheduler.tick(), 100);  // nobody waits for time to pass
}

TEST(Scheduler, APauseEndsEarlyOnceAndForOneTask) {
  std::string order;
  Scheduler scheduler(4);
  scheduler.spawn([&] {
    scheduler.pause(kNever);
    order += "a";
  });
  scheduler.spawn([&] {
    scheduler.pause(kNever);
    order += "b";
  });
  scheduler.spawn([&] {
    scheduler.pause(10);
    scheduler.end_pause(1);
    scheduler.end_pause(1);
    scheduler.pause(10);
    order += "c";
  });
  EXPECT_TRUE(scheduler.run());
  EXPECT_EQ(order, "bca");
}

TEST(Scheduler, WhoPausesIsNotStuckAndUnwindsWhenStopped) {
  bool unwound = false;
  Scheduler scheduler(5);
  scheduler.spawn([&] {
    struct Guard {
      bool* flag;
      ~Guard() { *flag = true; }
    } guard{&unwound};
    scheduler.pause(3);
    scheduler.block();
  });
  EXPECT_FALSE(scheduler.run());
  EXPECT_FALSE(unwound);
  scheduler.stop();
  EXPECT_TRUE(unwound);
}

}  // namespace
}  // namespace isoshard::sim
