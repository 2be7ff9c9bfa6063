// What is found before a save is published: files that are not what their ranks say.
#include <gtest/gtest.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>

#include "checkpoint/failing_storage.h"
#include "checkpoint/format/crc.h"
#include "engine/published_files.h"
#include "properties/mutant_storage.h"
#include "reshard/verify.h"
#include "tests/engine_world.h"

namespace isoshard {
namespace {

using checkpoint::FailingStorage;
using engine::RankInventories;
using properties::MutantStorage;

void write(Storage& disk, const std::string& path, const std::string& text) {
  const std::unique_ptr<WritableFile> file = disk.create(path);
  file->write_at(0, std::as_bytes(std::span(text)));
  file->close();
}

// The hidden folder of a save that is at work.
std::string staging(Storage& disk) {
  for (const DirectoryEntry& entry : disk.list("/run")) {
    if (entry.name.starts_with(".after")) return "/run/" + entry.name;
  }
  return "";
}

constexpr const char* kFile = "zero_pp_rank_1_mp_rank_00_optim_states.pt";

struct Outcome {
  std::vector<std::string> told = {"", ""};  // by rank
  std::string latest;
  bool is_published = false;
  reshard::Verdict verdict = reshard::Verdict::kHostile;
};

// Both ranks save at step 1, and again at step 2; before the second commit rank 1's files are
// spoilt, which no rank is told of.
Outcome commit_behind(const std::function<void(MemoryStorage&, const std::string&)>& spoil,
                      bool reread = true) {
  World world;
  Outcome outcome;
  const Error error = world.run([&](sim::Rank& rank, Trainer& trainer, CheckpointEngine& files) {
    trainer.step();
    save(trainer, files, "before");
    trainer.step();
    const auto pending =
        files.begin_save(trainer.state(), "/run", {.tag = "after", .reread = reread});
    while (pending->write_next(world.disk)) {
    }
    if (rank.number() == 1) spoil(world.disk, staging(world.disk));
    try {
      files.commit_save(pending.get(), [] { return true; });
    } catch (const Error& failure) {
      outcome.told[static_cast<size_t>(rank.number())] = failure.what();
    }
  });
  EXPECT_EQ(error.info().what, "") << error.what();
  outcome.latest = world.latest();
  outcome.is_published = world.disk.is_directory("/run/after");
  outcome.verdict = reshard::verify(world.disk, "/run", {}).verdict;
  EXPECT_EQ(staging(world.disk), "");
  return outcome;
}

void expect_refused(const Outcome& outcome, const std::string& rank, const std::string& file) {
  for (const std::string& text : outcome.told) {
    EXPECT_NE(text.find(rank), std::string::npos) << text;
    EXPECT_NE(text.find(file), std::string::npos) << text;
    EXPECT_NE(text.find("nothing was published"), std::string::npos) << text;
  }
  EXPECT_EQ(outcome.latest, "before");
  EXPECT_FALSE(outcome.is_published);
  EXPECT_EQ(outcome.verdict, reshard::Verdict::kVerified);
}

TEST(PublishedFiles, WhatIsSoundIsPublished) {
  const Outcome outcome = commit_behind([](MemoryStorage&, const std::string&) {});
  EXPECT_EQ(outcome.told, std::vector<std::string>({"", ""}));
  EXPECT_EQ(outcome.latest, "after");
  EXPECT_EQ(outcome.verdict, reshard::Verdict::kVerified);
}

TEST(PublishedFiles, AFileThatVanishedIsNamed) {
  expect_refused(commit_behind([](MemoryStorage& disk, const std::string& folder) {
                   disk.remove_file(folder + "/" + kFile);
                 }),
                 "rank 1", kFile);
}

TEST(PublishedFiles, AShortFileIsNamed) {
  expect_refused(commit_behind([](MemoryStorage& disk, const std::string& folder) {
                   const std::unique_ptr<WritableFile> file = disk.open_write(folder + "/" + kFile);
                   file->set_size(100);
                   file->close();
                 }),
                 "rank 1", kFile);
}

void put_earlier_file(MemoryStorage& disk, const std::string& folder) {
  const std::string path = folder + "/" + kFile;
  const std::string earlier = read_small_file(disk, std::string("/run/before/") + kFile, 1 << 24);
  ASSERT_EQ(earlier.size(), read_small_file(disk, path, 1 << 24).size()) << "the size tells them";
  disk.remove_file(path);
  write(disk, path, earlier);
}

TEST(PublishedFiles, AFileOfAnotherStepIsNamed) {
  expect_refused(commit_behind(put_earlier_file), "rank 1", kFile);
}

// What is given up where nothing is read again.
TEST(PublishedFiles, WithoutRereadingAFileOfAnotherStepIsFoundByVerify) {
  const Outcome outcome = commit_behind(put_earlier_file, false);
  EXPECT_EQ(outcome.told, std::vector<std::string>({"", ""}));
  EXPECT_EQ(outcome.latest, "after");
  EXPECT_GT(outcome.verdict, reshard::Verdict::kComplete);
}

TEST(PublishedFiles, AFileThatNoRankHasWrittenIsNamed) {
  const char* name = "zero_pp_rank_2_mp_rank_00_optim_states.pt";
  expect_refused(commit_behind([&](MemoryStorage& disk, const std::string& folder) {
                   write(disk, folder + "/" + name, "stale");
                 }),
                 "no rank", name);
}

TEST(PublishedFiles, TwoRanksOfOneFileAreNamed) {
  MemoryStorage disk;
  disk.make_directory("/f");
  write(disk, "/f/a", "text");
  const checkpoint::ManifestFile file{.path = "a", .size_bytes = 4, .hash = ""};
  try {
    engine::check_names_and_sizes(disk, "/f", {{file}, {}, {file}});
    FAIL() << "one name was taken for two files";
  } catch (const Error& error) {
    EXPECT_EQ(error.info().entry, "rank 0 and rank 2");
    EXPECT_EQ(error.info().file, "/f/a");
  }
}

// As a network file system whose list is older than its files.
class ListsNothing final : public MemoryStorage {
 public:
  std::vector<DirectoryEntry> list(const std::string&) override { return {}; }
};

TEST(PublishedFiles, AFileThatTheListLacksIsReadAllTheSame) {
  ListsNothing disk;
  disk.make_directory("/f");
  write(disk, "/f/a", "text");
  write(disk, "/f/b", "texu");
  checkpoint::ManifestFile file{
      .path = "a", .size_bytes = 4, .hash = "sha256:" + checkpoint::sha256_hex("text")};
  engine::check_contents(disk, "/f", 1, {file});
  file.path = "b";
  try {
    engine::check_contents(disk, "/f", 1, {file});
    FAIL() << "a file of other bytes was taken";
  } catch (const Error& error) {
    EXPECT_EQ(error.info().code, ErrorCode::kCorrupt);
    EXPECT_EQ(error.info().entry, "rank 1");
    EXPECT_EQ(error.info().file, "/f/b");
  }
  file.path = "c";
  EXPECT_THROW(engine::check_contents(disk, "/f", 1, {file}), Error);
}

// Rank 1's disk is full, and its writer keeps that to itself.
TEST(PublishedFiles, ARankThatSwallowsItsErrorsIsNamed) {
  World world;
  std::vector<std::string> told = {"", ""};
  const Error error = world.run([&](sim::Rank& rank, Trainer& trainer, CheckpointEngine& files) {
    save(trainer, files, "before");
    const auto pending = files.begin_save(trainer.state(), "/run", {.tag = "after"});
    FailingStorage full(world.disk, {.at = rank.number() == 1 ? 1 : -1, .error = ENOSPC});
    MutantStorage way(full, {.kind = properties::StorageMutant::Kind::kSwallowedWrite}, "");
    while (pending->write_next(way)) {
    }
    EXPECT_TRUE(pending->finished());
    try {
      files.commit_save(pending.get(), [] { return true; });
    } catch (const Error& failure) {
      told[static_cast<size_t>(rank.number())] = failure.what();
    }
  });
  EXPECT_EQ(error.info().what, "") << error.what();
  for (const std::string& text : told) {
    EXPECT_NE(text.find("rank 1"), std::string::npos) << text;
    EXPECT_NE(text.find("another size"), std::string::npos) << text;
  }
  EXPECT_EQ(world.latest(), "before");
}

// A save of one rank over itself; `fault` strikes in the second. Returns its calls.
std::vector<checkpoint::StorageCall> save_over(World* world, const checkpoint::CallFault& fault,
                                               bool warning_fails = false) {
  world->topology = {};
  std::vector<checkpoint::StorageCall> calls;
  const Error error = world->run([&](sim::Rank& rank, Trainer& trainer, CheckpointEngine& files) {
    save(trainer, files, "tag");
    FailingStorage failing(world->disk, fault);
    const ParallelState parallel = properties::parallel_state(rank);
    CheckpointEngine again(failing, parallel,
                           properties::deepspeed_config(world->config, world->topology, 1),
                           [&](const std::string& text) {
                             world->warnings.push_back(text);
                             if (warning_fails) throw std::runtime_error("no terminal");
                           });
    save(trainer, again, "tag");
    calls = failing.calls();
  });
  EXPECT_EQ(error.info().what, "") << error.what();
  return calls;
}

TEST(PublishedFiles, AReplacedFolderThatStaysIsTold) {
  World sound, failing;
  const auto calls = save_over(&sound, {});
  EXPECT_TRUE(sound.warnings.empty());
  const auto last = std::find(calls.rbegin(), calls.rend(), checkpoint::StorageCall::kRemoveTree);
  ASSERT_NE(last, calls.rend());
  save_over(&failing, {.at = calls.rend() - last - 1, .error = EACCES});
  ASSERT_EQ(failing.warnings.size(), 1u);
  EXPECT_NE(failing.warnings[0].find("/run/.trash-"), std::string::npos) << failing.warnings[0];
  EXPECT_NE(failing.warnings[0].find("doctor --clean"), std::string::npos);
  EXPECT_EQ(reshard::verify(failing.disk, "/run", {}).verdict, reshard::Verdict::kVerified);
}

// The warning is the caller's function: what it throws changes nothing, and no rank waits for it.
TEST(PublishedFiles, AWarningThatThrowsChangesNothing) {
  World sound, failing;
  const auto calls = save_over(&sound, {});
  const auto last = std::find(calls.rbegin(), calls.rend(), checkpoint::StorageCall::kRemoveTree);
  ASSERT_NE(last, calls.rend());
  save_over(&failing, {.at = calls.rend() - last - 1, .error = EACCES}, /*warning_fails=*/true);
  EXPECT_EQ(failing.warnings.size(), 1u);
  EXPECT_EQ(failing.latest(), "tag");
}

// Where it could not even be moved aside, doctor leaves it alone.
TEST(PublishedFiles, AReplacedFolderThatKeepsItsNameIsNotLeftToDoctor) {
  World sound, failing;
  const auto calls = save_over(&sound, {});
  const auto exchange = std::find(calls.rbegin(), calls.rend(), checkpoint::StorageCall::kExchange);
  const auto move = std::find(exchange.base(), calls.end(), checkpoint::StorageCall::kRename);
  ASSERT_NE(move, calls.end());
  save_over(&failing, {.at = move - calls.begin(), .error = EACCES});
  ASSERT_EQ(failing.warnings.size(), 1u);
  EXPECT_NE(failing.warnings[0].find("/run/.tag.isoshard-"), std::string::npos)
      << failing.warnings[0];
  EXPECT_EQ(failing.warnings[0].find("doctor"), std::string::npos);
}

}  // namespace
}  // namespace isoshard
