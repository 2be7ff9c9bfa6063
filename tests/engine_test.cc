// Saving and loading by ranks: DeepSpeed's meaning, its two corrections, and deaths at every point.
#include <gtest/gtest.h>

#include "tests/engine_world.h"

namespace isoshard {
namespace {

TEST(Engine, NothingToLoadIsAWarning) {
  World world;
  const Error error = world.run([](sim::Rank&, Trainer& trainer, CheckpointEngine& files) {
    const LoadResult result = files.load_checkpoint(&trainer.state(), "/run", {});
    EXPECT_FALSE(result.path);
    EXPECT_TRUE(result.client_state.is_null());
  });
  EXPECT_EQ(error.info().what, "");
  EXPECT_EQ(world.warnings.size(), 2u);
  EXPECT_NE(world.warnings[0].find("Unable to find latest file at /run/latest"), std::string::npos);
}

TEST(Engine, AMissingTagListsThoseThere) {
  World world;
  Error error{ErrorInfo{}};
  world.run([&error](sim::Rank& rank, Trainer& trainer, CheckpointEngine& files) {
    save(trainer, files, "first");
    try {
      files.load_checkpoint(&trainer.state(), "/run", {.tag = "second"});
    } catch (const Error& refused) {
      if (rank.number() == 0) error = refused;  // the others tell that rank 0 has failed
      throw;
    }
  });
  EXPECT_EQ(error.info().code, ErrorCode::kNotFound);
  EXPECT_EQ(error.info().expected, "one of: \"first\"");
}

TEST(Engine, TheDefaultTagCountsSteps) {
  World world;
  world.run([](sim::Rank&, Trainer& trainer, CheckpointEngine& files) {
    trainer.step();
    save(trainer, files);
  });
  EXPECT_EQ(world.latest(), "global_step1");
}

TEST(Engine, TagsThatDifferAreTakenWarnedOrRefused) {
  for (const std::string mode : {"Ignore", "Warn", "Fail", "sometimes"}) {
    World world;
    world.more_config = {{"checkpoint", {{"tag_validation", mode}}}};
    const Error error = world.run([](sim::Rank& rank, Trainer& trainer, CheckpointEngine& files) {
      save(trainer, files, "tag" + std::to_string(rank.number()));
    });
    if (mode == "Fail") {
      EXPECT_EQ(error.info().code, ErrorCode::kMismatch);
      EXPECT_FALSE(world.disk.is_directory("/run/tag0"));
    } else if (mode == "sometimes") {
      EXPECT_EQ(error.info().code, ErrorCode::kUsage);
    } else {
      EXPECT_EQ(world.latest(), "tag0");
      EXPECT_EQ(world.warnings.size(), mode == "Warn" ? 2u : 0u);
    }
  }
}

TEST(Engine, ClientStateGoesThereAndBack) {
  World world;
  const Json given = {{"epoch", 3}, {"best", 0.25}, {"name", "a b"}, {"list", {1, nullptr, true}}};
  const Error error = world.run([&](sim::Rank&, Trainer& trainer, CheckpointEngine& files) {
    files.save_checkpoint(trainer.state(), "/run", {.client_state = given});
    EXPECT_EQ(
        files.load_checkpoint(&trainer.state(), "/run", {.clean_client_state = true}).client_state,
        given);
    const Json all = files.load_checkpoint(&trainer.state(), "/run", {}).client_state;
    EXPECT_EQ(all.at("epoch"), 3);
    EXPECT_TRUE(all.contains("ds_version"));  // as DeepSpeed's
    EXPECT_FALSE(all.contains("module"));
  });
  EXPECT_EQ(error.info().what, "");
  const Error reserved = world.run([&](sim::Rank&, Trainer& trainer, CheckpointEngine& files) {
    files.save_checkpoint(trainer.state(), "/run",
                          {.client_state = {{"checkpoint_parallel_dimensions", 1}}});
  });
  EXPECT_EQ(reserved.info().entry, "checkpoint_parallel_dimensions");
  for (const char* key :
       {"ds_autoep_layers", "autoep_layers", "universal_checkpoint_info", "folding"}) {
    for (const int64_t experts : {0, 4}) {  // of models with experts alone
      World other;
      other.config.model.experts = experts;
      const Error error = other.run([&](sim::Rank&, Trainer& trainer, CheckpointEngine& files) {
        files.save_checkpoint(trainer.state(), "/run", {.client_state = {{key, 1}}});
      });
      EXPECT_EQ(error.info().entry, experts > 0 ? key : "") << error.what();
    }
  }
}

TEST(Engine, AnotherNumberOfRanksIsRefused) {
  World world;
  world.run([](sim::Rank&, Trainer& trainer, CheckpointEngine& files) { save(trainer, files); });
  world.topology.data = 3;
  const Error error = world.run([](sim::Rank&, Trainer& trainer, CheckpointEngine& files) {
    files.load_checkpoint(&trainer.state(), "/run", {});
  });
  EXPECT_EQ(error.info().code, ErrorCode::kMismatch);
  EXPECT_NE(error.info().next.find("reshard"), std::string::npos);
}

TEST(Engine, AFlippedBitIsRefused) {
  World world;
  world.run([](sim::Rank&, Trainer& trainer, CheckpointEngine& files) { save(trainer, files); });
  const std::string path = "/run/global_step0/zero_pp_rank_1_mp_rank_00_optim_states.pt";
  const int64_t size = world.disk.open_read(path)->size_bytes();
  std::byte byte{};
  // The last record before the end of the archive is small; a payload lies at a third.
  world.disk.open_read(path)->read_at(size / 3, {&byte, 1});
  byte ^= std::byte{1};
  const auto file = world.disk.open_write(path);
  file->write_at(size / 3, {&byte, 1});
  file->close();
  const Error error = world.run([](sim::Rank&, Trainer& trainer, CheckpointEngine& files) {
    trainer.state().counters.steps = 7;  // not what was saved
    try {
      files.load_checkpoint(&trainer.state(), "/run", {});
    } catch (const Error&) {
      EXPECT_EQ(trainer.state().counters.steps, 7) << "no rank's state was changed";
      throw;
    }
  });
  EXPECT_NE(std::string(error.what()).find("its CRC"), std::string::npos) << error.what();
}

TEST(Engine, TagsThatWouldReachElsewhereAreRefused) {
  for (const std::string tag : {"../other", "a/b", ".hidden", "latest", "..", "a\nb"}) {
    World world;
    const Error error = world.run(
        [&](sim::Rank&, Trainer& trainer, CheckpointEngine& files) { save(trainer, files, tag); });
    EXPECT_EQ(error.info().code, ErrorCode::kUsage) << tag;
  }
  World world;
  world.disk.make_directories("/run/logs");
  world.disk.create("/run/logs/precious")->close();
  const Error error = world.run(
      [](sim::Rank&, Trainer& trainer, CheckpointEngine& files) { save(trainer, files, "logs"); });
  EXPECT_NE(error.info().what.find("no checkpoint"), std::string::npos);
  EXPECT_TRUE(world.disk.is_file("/run/logs/precious"));
}

TEST(Engine, AnotherModelIsRefused) {
  for (int stage = 0; stage <= 3; ++stage) {
    World world;
    world.config = small(stage);
    world.run([](sim::Rank&, Trainer& trainer, CheckpointEngine& files) { save(trainer, files); });
    world.config.model.hidden = 3;
    world.config.model.intermediate = 4;
    const Error error = world.run([](sim::Rank&, Trainer& trainer, CheckpointEngine& files) {
      files.load_checkpoint(&trainer.state(), "/run", {});
    });
    EXPECT_NE(std::string(error.what()).find("another model"), std::string::npos)
        << stage << " " << error.what();
  }
}

// What the flags of load_checkpoint leave of a run's state, by stage.
TEST(Engine, FlagsChooseWhatIsLoaded) {
  for (int stage = 0; stage <= 3; ++stage) {
    World world;
    world.config = small(stage);
    world.config.model.dtype = DType::kBFloat16;
    world.config.schedule.kind = reference::ScheduleKind::kWarmup;
    std::vector<TrainingState> saved(2);
    world.run([&](sim::Rank& rank, Trainer& trainer, CheckpointEngine& files) {
      for (int i = 0; i < 3; ++i) trainer.step();
      save(trainer, files);
      saved[static_cast<size_t>(rank.number())] = trainer.state();
    });
    const auto load = [&](const LoadOptions& options) {
      std::vector<TrainingState> states(2);
      const Error error =
          world.run([&](sim::Rank& rank, Trainer& trainer, CheckpointEngine& files) {
            trainer.step();
            files.load_checkpoint(&trainer.state(), "/run", options);
            states[static_cast<size_t>(rank.number())] = trainer.state();
          });
      EXPECT_EQ(error.info().what, "") << error.what();
      return states;
    };
    const auto zero = [](const TrainingState& state) {
      for (const TrainedGroup& group : state.groups) {
        for (const auto& [name, values] : group.states) {
          for (const float value : values) {
            if (value != 0) return false;
          }
        }
      }
      return true;
    };
    const auto rounded = [](const TrainingState& state) {
      std::vector<float> values;
      for (const float value : state.groups[0].master) {
        values.push_back(rounded_to(DType::kBFloat16, value));
      }
      return values;
    };
    const TrainingState all = load({})[1];
    EXPECT_EQ(all.counters, saved[1].counters) << stage;
    EXPECT_EQ(all.groups[0].settings, saved[1].groups[0].settings) << stage;
    EXPECT_FALSE(zero(all));
    const TrainingState weights = load({.load_module_only = true})[1];
    EXPECT_EQ(weights.groups[0].master, rounded(saved[1])) << stage;
    EXPECT_TRUE(zero(weights));
    EXPECT_EQ(weights.counters.steps, 1);
    const TrainingState fresh = load({.load_optimizer_states = false})[1];
    EXPECT_EQ(fresh.groups[0].master, rounded(saved[1])) << stage;
    EXPECT_TRUE(zero(fresh));
    EXPECT_EQ(fresh.counters.steps, 3);
    EXPECT_EQ(load({.load_lr_scheduler_states = false})[1].counters.schedule_iteration, 0);
  }
}

// A save of a second state over a first: what `latest` leads to afterwards.
struct Outcome {
  bool old_state = false, new_state = false;
};

Outcome outcome(World& world, const reference::WholeState& first,
                const reference::WholeState& second) {
  std::vector<TrainingState> states(2);
  const Error error = world.run([&](sim::Rank& rank, Trainer& trainer, CheckpointEngine& files) {
    files.load_checkpoint(&trainer.state(), "/run", {});
    trainer.refresh_parameters();
    states[static_cast<size_t>(rank.number())] = trainer.state();
  });
  EXPECT_EQ(error.info().what, "") << error.what();
  const reference::WholeState found = reference::whole_state({&states[0], &states[1]});
  return {reference::difference(found, first).empty(),
          reference::difference(found, second).empty()};
}

// Rank death and disk faults at every operation of a save: old or new, never a mixture, and the
// next save succeeds.
TEST(Engine, AFaultAtEveryPointOfASaveLeavesOldOrNew) {
  using sim::FaultKind;
  int64_t cases = 0, old_states = 0, new_states = 0;
  World probe;
  std::vector<int64_t> begin(2), end(2);
  std::vector<TrainingState> one(2), two(2);
  const auto body = [&](sim::Rank& rank, Trainer& trainer, CheckpointEngine& files) {
    const size_t number = static_cast<size_t>(rank.number());
    trainer.step();
    save(trainer, files);
    one[number] = trainer.state();
    trainer.step();
    two[number] = trainer.state();
    begin[number] = rank.operations();
    save(trainer, files);
    end[number] = rank.operations();
  };
  probe.run(body);
  const auto first = reference::whole_state({&one[0], &one[1]});
  const auto second = reference::whole_state({&two[0], &two[1]});
  const std::vector<int64_t> from = begin, to = end;
  ASSERT_GT(to[0], from[0] + 20);
  for (const FaultKind kind : {FaultKind::kDieBefore, FaultKind::kDieInside, FaultKind::kDieAfter,
                               FaultKind::kDiskFull, FaultKind::kStaleHandle}) {
    for (int rank = 0; rank < 2; ++rank) {
      for (int64_t at = from[static_cast<size_t>(rank)]; at < to[static_cast<size_t>(rank)]; ++at) {
        World world;
        const Error error = world.run(body, {{.kind = kind, .rank = rank, .operation = at}});
        const Outcome found = outcome(world, first, second);
        ASSERT_TRUE(found.old_state || found.new_state) << "operation " << at << " of " << rank;
        const bool disk_fault = kind == FaultKind::kDiskFull || kind == FaultKind::kStaleHandle;
        if (disk_fault && error.info().what.empty()) continue;  // at a collective it does nothing
        ++cases;
        old_states += found.old_state;
        new_states += found.new_state;
        EXPECT_TRUE(found.new_state || !error.info().what.empty()) << "said to be saved";
        world.run([](sim::Rank&, Trainer& trainer, CheckpointEngine& files) {
          files.load_checkpoint(&trainer.state(), "/run", {});
          save(trainer, files, "again");
        });
        ASSERT_EQ(world.latest(), "again");
      }
    }
  }
  EXPECT_GT(old_states, 50);
  EXPECT_GT(new_states, 5);
  std::cout << cases << " faults: " << old_states << " old, " << new_states << " new\n";
}

TEST(Engine, AFailureOnOneRankIsToldOnAll) {
  World world;
  std::vector<std::string> told(2);
  int64_t operations = 0;
  world.run([&](sim::Rank& rank, Trainer& trainer, CheckpointEngine& files) {
    save(trainer, files);
    if (rank.number() == 1) operations = rank.operations();
  });
  int failures = 0;
  for (int64_t at = 0; at < operations; ++at) {
    World again;
    again.run(
        [&](sim::Rank& rank, Trainer& trainer, CheckpointEngine& files) {
          try {
            save(trainer, files);
          } catch (const Error& error) {
            told[static_cast<size_t>(rank.number())] = error.info().what;
          }
        },
        {{.kind = sim::FaultKind::kDiskFull, .rank = 1, .operation = at}});
    if (told[1].empty()) continue;
    ++failures;
    EXPECT_EQ(told[0], "The save failed on rank 1.");
    EXPECT_EQ(told[1], "No space is left on the device.");
    EXPECT_EQ(again.latest(), "");
    EXPECT_FALSE(again.disk.is_directory("/run/global_step0"));
    told = {"", ""};
  }
  EXPECT_GT(failures, 3);
}

}  // namespace
}  // namespace isoshard
