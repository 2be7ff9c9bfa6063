// Saves beside a run and in spite of a disk: snapshots, commits, guards, and two ways to misuse
// them.
#include <gtest/gtest.h>

#include <atomic>
#include <bit>
#include <thread>

#include "engine/guarded_save.h"
#include "reshard/verify.h"
#include "tests/engine_world.h"

namespace isoshard {
namespace {

using engine::GuardedOptions;
using engine::GuardedResult;
using engine::GuardedSave;
using engine::PendingSave;

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int kSteps = 4;
#else
constexpr int kSteps = 8;
#endif

std::map<std::string, std::string> files_in(Storage& disk, const std::string& folder) {
  std::map<std::string, std::string> files;
  for (const DirectoryEntry& entry : disk.list(folder)) {
    files[entry.name] = read_small_file(disk, folder + "/" + entry.name, 1 << 24);
  }
  return files;
}

// One rank whose save has kSteps files, so that a writer takes as many steps.
void many_files(World* world) {
  world->topology = {};
  world->config.model.experts = kSteps == 8 ? 6 : 2;
  world->config.model.top_k = 1;
}

// The run changes its state in kSteps steps, the writer writes kSteps files: every order of the
// two.
TEST(DecoupledSave, HoldsTheValuesOfTheCallInEveryInterleaving) {
  World world;
  many_files(&world);
  std::map<std::string, std::string> expected;
  int64_t orders = 0;
  const Error error = world.run([&](sim::Rank&, Trainer& trainer, CheckpointEngine& files) {
    trainer.step();
    const TrainingState at_the_call = trainer.state();
    files.save_checkpoint(at_the_call, "/expected", {});
    expected = files_in(world.disk, "/expected/global_step1");
    ASSERT_EQ(static_cast<int>(expected.size()), kSteps + 1);  // and the manifest
    for (uint32_t order = 0; order < (1u << (2 * kSteps)); ++order) {
      if (std::popcount(order) != kSteps) continue;
      TrainingState state = at_the_call;
      const auto pending = files.begin_save(state, "/run", {.save_latest = true});
      for (int step = 0; step < 2 * kSteps; ++step) {
        if ((order >> step & 1) != 0) {
          pending->write_next(world.disk);
          continue;
        }
        for (TrainedGroup& group : state.groups) group.master.assign(group.master.size(), -1.0f);
        for (TrainedParameter& p : state.parameters) p.values.assign(p.values.size(), -1.0f);
        ++state.counters.steps;
      }
      ASSERT_FALSE(world.disk.is_file("/run/latest")) << "moved before the commit";
      files.commit_save(pending.get(), [] { return true; });
      ASSERT_EQ(world.latest(), "global_step1");
      ASSERT_EQ(files_in(world.disk, "/run/global_step1"), expected) << "order " << order;
      world.disk.remove_tree("/run");
      ++orders;
    }
  });
  EXPECT_EQ(error.info().what, "") << error.what();
  EXPECT_EQ(orders, kSteps == 8 ? 12870 : 70);
}

TEST(DecoupledSave, AThreadWritesWhileTheRunTrains) {
  World world;
  many_files(&world);
  std::vector<float> losses, alone;
  world.run([&](sim::Rank&, Trainer& trainer, CheckpointEngine&) {
    for (int i = 0; i < 6; ++i) alone.push_back(trainer.step().loss);
  });
  world.run([&](sim::Rank&, Trainer& trainer, CheckpointEngine& files) {
    losses.push_back(trainer.step().loss);
    const auto pending = files.begin_save(trainer.state(), "/run", {});
    std::thread writer([&] {
      while (pending->write_next(world.disk)) {
      }
    });
    for (int i = 0; i < 5; ++i) losses.push_back(trainer.step().loss);
    files.commit_save(pending.get(), [&] {
      writer.join();
      return pending->finished();
    });
    files.load_checkpoint(&trainer.state(), "/run", {});
    EXPECT_EQ(trainer.state().counters.steps, 1);
  });
  EXPECT_EQ(losses, alone);
}

// The writer is alive and slow: the commit does not wait, and neither touches the other's memory.
TEST(DecoupledSave, ASlowWriterIsLeftBehind) {
  World world;
  many_files(&world);
  std::thread writer;
  std::atomic<bool> go{false};
  const Error error = world.run([&](sim::Rank&, Trainer& trainer, CheckpointEngine& files) {
    const std::shared_ptr<PendingSave> pending = files.begin_save(trainer.state(), "/run", {});
    writer = std::thread([&world, &go, pending] {
      pending->write_next(world.disk);
      while (!go) std::this_thread::yield();
      while (pending->write_next(world.disk)) {
      }
    });
    files.commit_save(pending.get(), [] { return false; });
  });
  go = true;
  writer.join();
  EXPECT_NE(std::string(error.what()).find("has not finished in time"), std::string::npos);
  EXPECT_EQ(world.latest(), "");
  EXPECT_FALSE(world.disk.is_directory("/run/global_step0"));
}

TEST(DecoupledSave, ADeadWriterFailsTheCommitOnEveryRank) {
  World world;
  std::vector<std::string> told(2);
  world.run([&](sim::Rank& rank, Trainer& trainer, CheckpointEngine& files) {
    save(trainer, files, "before");
    const auto pending = files.begin_save(trainer.state(), "/run", {.tag = "after"});
    int turns = 0;  // rank 1's writer is dead; the deadline is 100 turns
    const auto wait = [&] {
      while (rank.number() == 0 && pending->write_next(world.disk)) {
      }
      while (!pending->finished() && ++turns < 100) {
      }
      return pending->finished();
    };
    try {
      files.commit_save(pending.get(), wait);
    } catch (const Error& error) {
      told[static_cast<size_t>(rank.number())] = error.what();
    }
    EXPECT_EQ(turns, rank.number() == 0 ? 0 : 100);
  });
  EXPECT_NE(told[0].find("failed on rank 1"), std::string::npos) << told[0];
  EXPECT_NE(told[1].find("has not finished in time"), std::string::npos) << told[1];
  EXPECT_EQ(world.latest(), "before");
  EXPECT_FALSE(world.disk.is_directory("/run/after"));
}

TEST(Engine, SideFilesGoWithTheCheckpoint) {
  World world;
  world.disk.make_directories("/tokenizer");
  const auto file = world.disk.create("/tokenizer/vocab.json");
  file->write_at(0, std::as_bytes(std::span("{}", 2)));
  file->close();
  const auto attempt = [&](const std::string& name, const std::string& path) {
    return world.run([&](sim::Rank&, Trainer& trainer, CheckpointEngine& files) {
      files.save_checkpoint(trainer.state(), "/run",
                            {.tag = "t", .side_files = {{.name = name, .path = path}}});
    });
  };
  EXPECT_EQ(attempt("vocab.json", "/tokenizer/vocab.json").info().what, "");
  EXPECT_EQ(read_small_file(world.disk, "/run/t/vocab.json", 9), "{}");
  const reshard::Verification verified = reshard::verify(world.disk, "/run/t", {});
  EXPECT_EQ(verified.findings.size(), 0u) << verified.findings[0].text;
  EXPECT_NE(read_small_file(world.disk, "/run/t/MANIFEST.json", 1 << 20).find("vocab.json"),
            std::string::npos);
  for (const char* name : {"mp_rank_00_model_states.pt", "../up", ".hidden", "a/b"}) {
    EXPECT_EQ(attempt(name, "/tokenizer/vocab.json").info().code, ErrorCode::kUsage) << name;
  }
  const Error twice = world.run([](sim::Rank&, Trainer& trainer, CheckpointEngine& files) {
    const engine::SideFile file{.name = "a.json", .path = "/tokenizer/vocab.json"};
    files.save_checkpoint(trainer.state(), "/run", {.tag = "t", .side_files = {file, file}});
  });
  EXPECT_EQ(twice.info().found, "another side file has it");
  EXPECT_EQ(attempt("other.json", "/tokenizer/none").info().code, ErrorCode::kNotFound);
  EXPECT_TRUE(world.disk.is_file("/run/t/vocab.json")) << "the one before is as it was";
}

struct Told {
  std::vector<std::vector<std::string>> log = {{}, {}};
  std::vector<std::vector<float>> losses = {{}, {}};
  std::vector<std::string> durable = {"", ""};
  int after = 0;
};

// Three steps with a guarded save behind each; `at`, `kind`: a fault on rank 1.
Told guarded(const sim::Faults& faults, bool after_fails, std::vector<int64_t>* operations) {
  World world;
  world.disk.tell_free_space(100);
  world.disk.make_directories("/tokenizer");
  world.disk.create("/tokenizer/vocab.json")->close();
  Told told;
  const Error error = world.run(
      [&](sim::Rank& rank, Trainer& trainer, CheckpointEngine& files) {
        const size_t number = static_cast<size_t>(rank.number());
        const ParallelState parallel = properties::parallel_state(rank);
        GuardedSave guard(files, rank.storage(world.disk), parallel,
                          [&](const std::string& line) { told.log[number].push_back(line); });
        for (int step = 0; step < 3; ++step) {
          told.losses[number].push_back(trainer.step().loss);
          if (operations != nullptr && number == 1) operations->push_back(rank.operations());
          guard.save(trainer.state(), {.enabled = true,
                                       .output_dir = "/run",
                                       .side_files = {{"vocab.json", "/tokenizer/vocab.json"}},
                                       .after = [&] {
                                         ++told.after;
                                         if (after_fails) throw std::runtime_error("no logger");
                                       }});
        }
        told.durable[number] = guard.last_durable();
        if (operations != nullptr && number == 1) operations->push_back(rank.operations());
      },
      faults);
  EXPECT_EQ(error.info().what, "") << error.what();
  return told;
}

TEST(GuardedSave, ADiskThatFailsDoesNotTouchTheRun) {
  using sim::FaultKind;
  std::vector<int64_t> operations;
  const Told good = guarded({}, false, &operations);
  ASSERT_EQ(operations.size(), 4u);
  EXPECT_EQ(good.after, 3);
  EXPECT_EQ(good.durable[0], "/run/global_step3");
  const std::map<FaultKind, std::string> words = {
      {FaultKind::kDiskFull, "No space is left"},
      {FaultKind::kQuota, "quota is exceeded"},
      {FaultKind::kReadOnly, "mounted read-only"},
      {FaultKind::kNoPermission, "Permission is denied"},
      {FaultKind::kStaleHandle, "handle is stale"}};
  for (const auto& [kind, text] : words) {
    sim::Faults faults;  // in the second save, which ends the sooner for it
    const int64_t end = operations[1] + (operations[2] - operations[1]) / 3;
    for (int64_t at = operations[1]; at < end; ++at) {
      faults.push_back({.kind = kind, .rank = 1, .operation = at});
    }
    const Told told = guarded(faults, false, nullptr);
    EXPECT_EQ(told.losses, good.losses) << text;
    EXPECT_EQ(told.after, 3) << text;
    ASSERT_EQ(told.log[1].size(), 1u) << text;
    EXPECT_NE(told.log[1][0].find(text), std::string::npos) << told.log[1][0];
    EXPECT_NE(told.log[1][0].find("Safe: /run/global_step1."), std::string::npos) << told.log[1][0];
    EXPECT_NE(told.log[1][0].find("/run/"), std::string::npos);
    const bool space = kind == FaultKind::kDiskFull || kind == FaultKind::kQuota;
    const std::string& line = told.log[1][0];
    const std::string words = " bytes to write, 100 are free: ";
    const size_t at = line.find(words);
    ASSERT_EQ(at != std::string::npos, space) << line;
    if (space) {
      const int64_t missing = std::stoll(line.substr(at + words.size()));
      const int64_t needed = std::stoll(line.substr(line.rfind(' ', at - 1) + 1));
      EXPECT_EQ(needed, missing + 100) << line;
      EXPECT_NE(line.find(" are missing"), std::string::npos) << line;
    }
    ASSERT_EQ(told.log[0].size(), 1u) << text;
    EXPECT_NE(told.log[0][0].find("failed on rank 1"), std::string::npos) << told.log[0][0];
    EXPECT_EQ(told.durable[1], "/run/global_step3") << text;
  }
}

TEST(GuardedSave, WhatRunsAfterwardsMasksNothing) {
  const Told told = guarded({}, true, nullptr);
  EXPECT_EQ(told.after, 3);
  EXPECT_EQ(told.durable[0], "/run/global_step3");
  ASSERT_EQ(told.log[0].size(), 3u);
  EXPECT_NE(told.log[0][0].find("no logger"), std::string::npos);
  EXPECT_TRUE(told.log[1].empty());
}

TEST(GuardedSave, IsOffUnlessAskedFor) {
  World world;
  const Error error = world.run([&](sim::Rank& rank, Trainer& trainer, CheckpointEngine& files) {
    GuardedSave guard(files, world.disk, properties::parallel_state(rank),
                      [](const std::string&) {});
    const GuardedResult result = guard.save(trainer.state(), {.output_dir = "/run"});
    EXPECT_FALSE(result.saved);
    EXPECT_EQ(result.message, "");
    EXPECT_EQ(guard.last_durable(), "");
  });
  EXPECT_EQ(error.info().what, "");
  EXPECT_FALSE(world.disk.is_directory("/run"));
}

// A save behind `if rank == 0`: the others are in the next step's collectives, for ever.
TEST(Hazard, ASaveBehindRankZeroIsToldAtOnce) {
  World world;
  const Error error = world.run([&](sim::Rank& rank, Trainer& trainer, CheckpointEngine& files) {
    trainer.step();
    if (rank.number() == 0) save(trainer, files);
    trainer.step();
  });
  const std::string text = error.what();
  EXPECT_EQ(error.info().code, ErrorCode::kMismatch);
  EXPECT_NE(text.find("rank 0"), std::string::npos) << text;
  EXPECT_NE(text.find("rank 1"), std::string::npos) << text;
  EXPECT_NE(text.find("checkpoint.cc:"), std::string::npos) << text;
}

TEST(Hazard, ASaveBehindRankZeroAtTheEndIsADeadlock) {
  World world;
  const Error error = world.run([&](sim::Rank& rank, Trainer& trainer, CheckpointEngine& files) {
    if (rank.number() == 0) save(trainer, files);
  });
  const std::string text = error.what();
  EXPECT_NE(text.find("Deadlock"), std::string::npos) << text;
  EXPECT_NE(text.find("rank 0 waits for rank 1"), std::string::npos) << text;
  EXPECT_NE(text.find("checkpoint.cc:"), std::string::npos) << text;
}

// A caller that swallows a failed save's error on one rank: all ranks have it, so none runs ahead.
TEST(Hazard, ASwallowedErrorLeavesTheRanksInStep) {
  std::vector<int64_t> begins, ends;  // rank 1's operations around each save
  std::vector<float> losses[2];
  int swallowed[2] = {0, 0};
  const auto body = [&](sim::Rank& rank, Trainer& trainer, CheckpointEngine& files) {
    for (int step = 0; step < 3; ++step) {
      losses[rank.number()].push_back(trainer.step().loss);
      if (rank.number() == 1) begins.push_back(rank.operations());
      try {
        save(trainer, files);
      } catch (const Error&) {
        ++swallowed[rank.number()];
      }
      if (rank.number() == 1) ends.push_back(rank.operations());
    }
  };
  World probe;
  probe.run(body);
  EXPECT_EQ(swallowed[1], 0);
  const std::vector<float> expected = losses[0];
  for (std::vector<float>& list : losses) list.clear();
  sim::Faults faults;
  for (int64_t at = begins[1]; at < (begins[1] + ends[1]) / 2; ++at) {
    faults.push_back({.kind = sim::FaultKind::kDiskFull, .rank = 1, .operation = at});
  }
  World world;
  const Error error = world.run(body, faults);
  EXPECT_EQ(error.info().what, "") << error.what();
  EXPECT_EQ(swallowed[0], 1);
  EXPECT_EQ(swallowed[1], 1);
  EXPECT_EQ(losses[0], expected);
  EXPECT_EQ(losses[1], expected);
  EXPECT_EQ(world.latest(), "global_step3");
}

}  // namespace
}  // namespace isoshard
