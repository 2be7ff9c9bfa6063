// A plan that several ranks carry out together: the same bytes, sums and counts as one makes alone,
// whatever the number of ranks; and where one fails, all say so.
#include "reshard/team.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <map>

#include "checkpoint/deepspeed/reader.h"
#include "checkpoint/deepspeed/universal_blueprint.h"
#include "checkpoint/deepspeed/weights_blueprint.h"
#include "checkpoint/failing_storage.h"
#include "checkpoint/memory_storage.h"
#include "checkpoint/posix_storage.h"
#include "core/error.h"
#include "reshard/convert.h"
#include "reshard/digest.h"
#include "reshard/executor.h"
#include "reshard/manifest_check.h"
#include "sim/cluster.h"

namespace isoshard::reshard {
namespace {

using checkpoint::FailingStorage;
using checkpoint::FileBlueprint;
using checkpoint::MemoryStorage;
using checkpoint::PosixStorage;
using checkpoint::ShardedState;

constexpr int kRanks[] = {1, 2, 3, 7, 16};

StreamOptions options_of(const ShardedState& state) {
  StreamOptions options{.workers = 2, .open_files = 3};
  options.digest = digested_leaves(state, Sections::kAll);
  options.whole_files = every_file(state);
  for (const int leaf : options.digest) {
    if (state.leaf(leaf).dtype == DType::kFloat32)
      options.casts.push_back({leaf, DType::kBFloat16});
  }
  return options;
}

std::map<std::string, std::string> files_of(Storage& disk, const ReshardPlan& plan,
                                            const std::string& folder) {
  std::map<std::string, std::string> files;
  for (const TargetFile& target : plan.targets)
    files[target.path()] = read_small_file(disk, folder + "/" + target.path(), 1 << 30);
  return files;
}

void expect_same(const StreamResult& a, const StreamResult& b) {
  EXPECT_EQ(a.leaves, b.leaves);
  EXPECT_EQ(a.casts, b.casts);
  EXPECT_EQ(a.whole_files, b.whole_files);
  EXPECT_EQ(a.bytes_read, b.bytes_read);
  EXPECT_EQ(a.bytes_written, b.bytes_written);
  ASSERT_EQ(a.files.size(), b.files.size());
  for (size_t i = 0; i < a.files.size(); ++i) {
    EXPECT_EQ(a.files[i].path, b.files[i].path);
    EXPECT_EQ(a.files[i].size_bytes, b.files[i].size_bytes);
    EXPECT_EQ(a.files[i].ecma, b.files[i].ecma) << a.files[i].path;
    EXPECT_EQ(a.files[i].jones, b.files[i].jones) << a.files[i].path;
  }
}

// What a recording becomes: its universal form and its fp32 weights, where it has them.
std::vector<ReshardPlan> plans_of(const ShardedState& state) {
  std::vector<ReshardPlan> plans;
  const auto add = [&](const auto& make) {
    try {
      plans.push_back(make_plan(state, make().files));
    } catch (const Error& error) {
      EXPECT_EQ(error.info().code, ErrorCode::kUnsupported) << error.what();
    }
  };
  add([&] { return checkpoint::universal_blueprints(state, {}); });
  add([&] { return checkpoint::weights_blueprints(state, {.max_shard_bytes = 20'000}); });
  return plans;
}

TEST(Team, MakesWhatOneMakesAlone) {
  int conversions = 0;
  for (const auto& entry :
       std::filesystem::directory_iterator(std::string(ISOSHARD_TRACES) + "/deepspeed")) {
    const std::string source = entry.path().string() + "/ckpt";
    if (!std::filesystem::is_directory(source)) continue;
    SCOPED_TRACE(source);
    PosixStorage traces;
    const ShardedState state = checkpoint::read_checkpoint(traces, source, {});
    const StreamOptions options = options_of(state);
    for (const ReshardPlan& plan : plans_of(state)) {
      MemoryStorage disk;
      disk.make_directory("/alone");
      const StreamResult alone = execute(disk, state, plan, "/alone", options);
      const auto expected = files_of(disk, plan, "/alone");
      for (int turn = 0; turn < 2; ++turn) {  // two of the numbers for each, all in turn
        const int ranks = kRanks[static_cast<size_t>(conversions * 2) % std::size(kRanks)];
        SCOPED_TRACE(ranks);
        const std::string folder = "/team" + std::to_string(ranks);
        disk.make_directory(folder);
        sim::Cluster cluster({.data = ranks});
        cluster.run([&](sim::Rank& rank) {
          StreamOptions shared = options;
          shared.team = &rank.group(GroupKind::kWorld);
          expect_same(execute(disk, state, plan, folder, shared), alone);
        });
        EXPECT_EQ(files_of(disk, plan, folder), expected);
        ++conversions;
      }
      MemoryStorage none;
      sim::Cluster cluster({.data = 3});
      cluster.run([&](sim::Rank& rank) {  // reading alone is shared, too
        StreamOptions shared = options;
        shared.team = &rank.group(GroupKind::kWorld);
        EXPECT_EQ(digest_leaves(none, state, shared).leaves, alone.leaves);
      });
    }
  }
  EXPECT_GT(conversions, 80);
}

// Whichever call of whichever rank fails, each rank throws: that one its own error, the others one
// that names it.
TEST(Team, AFailureOfOneIsToldByAll) {
  PosixStorage traces;
  const ShardedState state = checkpoint::read_checkpoint(
      traces, std::string(ISOSHARD_TRACES) + "/deepspeed/z1_bf16_dp2/ckpt", {});
  const ReshardPlan plan = std::move(plans_of(state)[0]);
  int failures = 0;
  for (int64_t at = 0; at < 400; at += 7) {
    for (int bad = 0; bad < 3; ++bad) {
      MemoryStorage disk;
      disk.make_directory("/out");
      std::vector<ErrorCode> codes(3, ErrorCode::kUsage);
      bool struck = false;
      sim::Cluster cluster({.data = 3});
      cluster.run([&](sim::Rank& rank) {
        const bool fails = rank.number() == bad;
        FailingStorage mine(disk, {.at = fails ? at : -1, .error = fails ? EIO : 0});
        StreamOptions shared{.workers = 1, .team = &rank.group(GroupKind::kWorld)};
        try {
          execute(mine, state, plan, "/out", shared);
        } catch (const Error& error) {
          codes[static_cast<size_t>(rank.number())] = error.info().code;
          if (!fails) {
            EXPECT_NE(std::string(error.what()).find("rank " + std::to_string(bad)),
                      std::string::npos);
          }
        }
        struck = struck || mine.failures() > 0;
      });
      for (int rank = 0; rank < 3; ++rank) {
        const ErrorCode expected = !struck       ? ErrorCode::kUsage
                                   : rank == bad ? ErrorCode::kUnreadable
                                                 : ErrorCode::kInterrupted;
        EXPECT_EQ(codes[static_cast<size_t>(rank)], expected)
            << "call " << at << " of rank " << bad;
      }
      failures += struck;
    }
  }
  EXPECT_GT(failures, 20);
}

ConvertOptions conversion(Communicator* team) {
  ConvertOptions options{.target = "/t/universal", .stream = {.workers = 1, .team = team}};
  options.latest_path = "/t/latest_universal";
  options.latest_text = "universal";
  options.certificate = {{"program", "a test"}};
  return options;
}

// Every file of a folder, by its path.
void collect(Storage& disk, const std::string& folder, std::map<std::string, std::string>* files) {
  for (const DirectoryEntry& entry : disk.list(folder)) {
    const std::string path = folder + "/" + entry.name;
    if (entry.kind == DirectoryEntry::Kind::kDirectory)
      collect(disk, path, files);
    else
      (*files)[path] = read_small_file(disk, path, 1 << 30);
  }
}

TEST(Team, PublishesWhatOnePublishesAlone) {
  PosixStorage traces;
  for (const char* name : {"z1_bf16_dp2", "z3_bf16_dp3", "autotp_z1_tp2_dp2"}) {
    SCOPED_TRACE(name);
    const ShardedState state = checkpoint::read_checkpoint(
        traces, std::string(ISOSHARD_TRACES) + "/deepspeed/" + name + "/ckpt", {});
    const ReshardPlan plan = std::move(plans_of(state)[0]);
    MemoryStorage alone;
    alone.make_directory("/t");
    convert(alone, state, plan, conversion(nullptr));
    std::map<std::string, std::string> expected;
    collect(alone, "/t", &expected);
    for (const int ranks : kRanks) {
      MemoryStorage disk;
      disk.make_directory("/t");
      sim::Cluster cluster({.data = ranks});
      cluster.run([&](sim::Rank& rank) {
        convert(disk, state, plan, conversion(&rank.group(GroupKind::kWorld)));
      });
      std::map<std::string, std::string> found;
      collect(disk, "/t", &found);
      EXPECT_EQ(found, expected) << ranks << " ranks";
    }
  }
}

// A rank that fails at any call: the target is absent, or it is whole, and then the first rank
// alone may have failed, behind the last rename.
TEST(Team, PublishesNothingWhereARankFails) {
  PosixStorage traces;
  const ShardedState state = checkpoint::read_checkpoint(
      traces, std::string(ISOSHARD_TRACES) + "/deepspeed/z1_bf16_dp2/ckpt", {});
  const ReshardPlan plan = std::move(plans_of(state)[0]);
  MemoryStorage alone;
  alone.make_directory("/t");
  convert(alone, state, plan, conversion(nullptr));
  std::map<std::string, std::string> expected;
  collect(alone, "/t/universal", &expected);
  int absent = 0, whole = 0;
  for (int64_t at = 0; at < 2400; at += 29) {
    for (int bad = 0; bad < 3; ++bad) {
      MemoryStorage disk;
      disk.make_directory("/t");
      int failed = 0;
      sim::Cluster cluster({.data = 3});
      cluster.run([&](sim::Rank& rank) {
        FailingStorage mine(disk, {.at = rank.number() == bad ? at : -1, .error = EIO});
        try {
          convert(mine, state, plan, conversion(&rank.group(GroupKind::kWorld)));
        } catch (const Error&) {
          ++failed;
        }
      });
      EXPECT_TRUE(failed == 0 || failed == 3) << failed << " ranks have told of it";
      const bool there = disk.is_directory("/t/universal");
      EXPECT_TRUE(there || failed == 3);
      std::map<std::string, std::string> found;
      if (there) collect(disk, "/t/universal", &found);
      EXPECT_TRUE(found == (there ? expected : std::map<std::string, std::string>()));
      (there ? whole : absent) += 1;
    }
  }
  EXPECT_GT(absent, 20);
  EXPECT_GT(whole, 20);
}

TEST(Team, WordsAreJoinedAtAnyNumberOfRanks) {
  for (const int ranks : kRanks) {
    for (const size_t count : {0, 1, 2, 5, 100}) {
      sim::Cluster cluster({.data = ranks});
      cluster.run([&](sim::Rank& rank) {
        std::vector<uint64_t> words(count), expected(count);
        for (size_t i = 0; i < count; ++i) {
          words[i] = static_cast<uint64_t>(rank.number() + 1) << (i % 50);
          for (int other = 0; other < ranks; ++other)
            expected[i] ^= static_cast<uint64_t>(other + 1) << (i % 50);
        }
        xor_over(rank.group(GroupKind::kWorld), &words);
        EXPECT_EQ(words, expected);
      });
    }
  }
}

}  // namespace
}  // namespace isoshard::reshard
