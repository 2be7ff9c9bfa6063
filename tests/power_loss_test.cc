// What power loss may leave of publications, saves and conversions: the old or the new, whole. And
// the mistakes that this law must notice.
#include <gtest/gtest.h>

#include <cstdlib>
#include <iostream>
#include <map>

#include "checkpoint/publication.h"
#include "checkpoint/volatile_storage.h"
#include "properties/crash_case.h"

namespace isoshard {
namespace {

using checkpoint::Durability;
using checkpoint::StagedFolder;
using checkpoint::VolatileDisk;
using checkpoint::VolatileStorage;
using properties::CrashJob;
using properties::CrashTally;
using properties::StorageMutant;
using Kind = StorageMutant::Kind;

// ISOSHARD_CASES (100 if unset) times 200 for each job.
int64_t least_cases() {
  const char* text = std::getenv("ISOSHARD_CASES");
  return 200 * std::max<int64_t>(1, text == nullptr ? 100 : std::atoll(text));
}

std::vector<std::string> names_of_jobs() {
  std::vector<std::string> names;
  for (const CrashJob& job : properties::crash_jobs()) names.push_back(job.name);
  return names;
}

void publish_in_place(VolatileStorage* storage, bool to_the_end) {
  storage->renames_folders = false;
  storage->make_directory("/top");
  storage->begin_log();
  StagedFolder staged(*storage, "/top/out", false);
  const auto file = storage->create("/top/out/file");
  file->write_at(0, std::as_bytes(std::span("text", 4)));
  file->sync();
  file->close();
  if (to_the_end) staged.publish();
}

// The mark's name goes before the job ends well, and must stay away.
TEST(PowerLossInPlace, TheMarkDoesNotComeBack) {
  VolatileStorage storage;
  publish_in_place(&storage, true);
  for (uint64_t seed = 0; seed < 64; ++seed) {
    for (const Durability model : {Durability::kReordered, Durability::kLostEntries}) {
      const auto found = storage.after_crash(model, seed);
      EXPECT_FALSE(checkpoint::is_unfinished(*found, "/top/out")) << name(model) << " " << seed;
      EXPECT_EQ(read_small_file(*found, "/top/out/file", 9), "text");
    }
  }
}

// Names of files may reach the disk before the mark's, unless that is made durable first.
TEST(PowerLossInPlace, NoFileIsThereWithoutTheMark) {
  VolatileStorage storage;
  publish_in_place(&storage, false);
  VolatileDisk disk = storage.base();
  int with_file = 0;
  for (const checkpoint::DiskOperation& operation : storage.log()) {
    disk.apply(operation);
    for (uint64_t seed = 0; seed < 64; ++seed) {
      const auto found = disk.after_crash({.model = Durability::kReordered, .seed = seed});
      if (!found->is_file("/top/out/file")) continue;
      ++with_file;
      EXPECT_TRUE(checkpoint::is_unfinished(*found, "/top/out")) << operation.text << " " << seed;
    }
  }
  EXPECT_GT(with_file, 0);
}

class PowerLoss : public testing::TestWithParam<std::string> {};

TEST_P(PowerLoss, LeavesTheOldOrTheNew) {
  const CrashTally tally = properties::check_crashes(properties::crash_job(GetParam()), {},
                                                     {.least_cases = least_cases()});
  std::cout << GetParam() << ": " << tally.cases << " cases behind " << tally.operations
            << " operations, " << tally.distinct << " distinct outcomes, "
            << static_cast<int64_t>(static_cast<double>(tally.cases) / tally.seconds)
            << " cases/s\n";
  EXPECT_EQ(tally.failure, "");
  EXPECT_GT(tally.cases, 0);
}

INSTANTIATE_TEST_SUITE_P(, PowerLoss, testing::ValuesIn(names_of_jobs()),
                         [](const auto& each) { return each.param; });

// What a job does not notice is equivalent there; kSurvivors says why. "file N" and "folder N" are
// the syncs that can be left out, "late" all syncs of files at once behind the next rename.
struct Survivors {
  const char* job;
  const char* with_whole_sync;     // sync_everything is as it is
  const char* without_whole_sync;  // and where it does nothing either
  const char* other;               // mistakes that are no lost syncs
};

void PrintTo(const Survivors& survivors, std::ostream* out) { *out << survivors.job; }

class PowerLossMutants : public testing::TestWithParam<Survivors> {
 protected:
  // Of the first number whose save has files of both ranks, and the next.
  CrashTally check(const StorageMutant& mutant) const {
    return properties::check_crashes(properties::crash_job(GetParam().job), mutant,
                                     {.first_number = 1, .least_cases = 2000});
  }

  // Adds the mutant's name to `survivors`, unless the law notices it.
  void fight(const StorageMutant& mutant, const std::string& name, std::string* survivors) {
    const CrashTally tally = check(mutant);
    if (tally.failure.empty()) {
      *survivors += (survivors->empty() ? "" : ", ") + name;
    } else {
      ++killed_;
    }
  }

  int killed_ = 0;
};

TEST_P(PowerLossMutants, EverySyncThatMattersIsMissed) {
  const CrashTally good = check({});
  ASSERT_EQ(good.failure, "");
  for (const bool without_whole_sync : {false, true}) {
    std::string survivors;
    if (without_whole_sync) {
      fight({.without_whole_sync = true}, "none but sync_everything", &survivors);
    }
    for (int n = 0; n < good.file_syncs; ++n) {
      fight({Kind::kLostFileSync, n, without_whole_sync}, "file " + std::to_string(n), &survivors);
    }
    fight({Kind::kLateFileSync, -1, without_whole_sync}, "late", &survivors);
    for (int n = 0; n < good.folder_syncs; ++n) {
      fight({Kind::kLostFolderSync, n, without_whole_sync}, "folder " + std::to_string(n),
            &survivors);
    }
    EXPECT_EQ(survivors,
              without_whole_sync ? GetParam().without_whole_sync : GetParam().with_whole_sync);
  }
  std::cout << GetParam().job << ": " << killed_ << " mutants noticed\n";
}

TEST_P(PowerLossMutants, EveryOtherMistakeIsNoticedWhereItCanBeMade) {
  const std::map<Kind, std::string> kinds = {{Kind::kEarlyPointer, "pointer first"},
                                             {Kind::kTwoStepExchange, "exchange in two steps"},
                                             {Kind::kTwoStepReplace, "replacement in two steps"},
                                             {Kind::kRewrittenFile, "file written over"},
                                             {Kind::kLostMark, "no mark"},
                                             {Kind::kWriteBehindSync, "write behind sync"},
                                             {Kind::kEarlyPublication, "published early"}};
  std::string survivors;
  for (const auto& [kind, name] : kinds) {
    if (check({.kind = kind}).strikes > 0) fight({.kind = kind}, name, &survivors);
  }
  EXPECT_EQ(survivors, GetParam().other);
  std::cout << GetParam().job << ": " << killed_ << " mutants noticed\n";
}

// Why a mutant is equivalent:
// - StagedFolder::publish makes everything durable before the rename, or before the mark goes.
// Until
//   then no reader sees the files (in place: the mark is there), so that the syncs of each file, of
//   each folder inside, and of the folders above that were made before it, are needed only where
//   sync_everything does nothing; and a write behind a file's sync only where no sync_everything
//   follows. On a real disk the syncs of files report errors that syncfs does not.
// - Saves and conversions sync every file and folder: sync_everything alone can be left out there.
//   The files of "publish" are not synced one by one; there it cannot.
// - A folder's sync that another sync of the same folder follows before the job's end, with nothing
//   between that builds on it: "replace" 0 and 1 (by 2); in place, settle's (1, by publish's 2);
//   "convert" 1 and 3, in place 4 and 6, over 2 (the side file's sync or the pointer's comes last,
//   and the pointer is renamed only behind one of them). Over 1 counts: the old folder goes next.
// - "save_again" and "convert_over" leave the pointer's text as it was: its folder need not be
//   synced, and it cannot come too early.
// - "drop_in_place" publishes nothing: only that the mark comes first and goes last counts.
constexpr Survivors kSurvivors[] = {
    {"publish", "file 0, late, folder 0, folder 1, folder 3", "", "write behind sync"},
    {"publish_over", "file 0, late, folder 0, folder 1", "", "write behind sync"},
    {"publish_in_place", "file 0, late, folder 1, folder 2, folder 3, folder 4, folder 6, folder 7",
     "", "write behind sync"},
    {"drop_in_place", "file 0, file 1, file 2, late",
     "none but sync_everything, file 0, file 1, file 2, late", "write behind sync"},
    {"replace", "folder 0, folder 1", "none but sync_everything, folder 0, folder 1", ""},
    {"save", "file 0, file 1, file 2, file 3, folder 0, folder 2", "none but sync_everything", ""},
    {"next_save", "file 0, file 1, file 2, file 3, folder 0", "none but sync_everything", ""},
    {"save_again", "file 0, file 1, file 2, file 3, folder 0, folder 2",
     "none but sync_everything, folder 2", "pointer first"},
    {"save_in_place", "file 0, file 1, file 2, file 3, folder 1, folder 2, folder 4, folder 5",
     "none but sync_everything, folder 1", ""},
    {"next_save_in_place", "file 0, file 1, file 2, file 3, folder 1, folder 2, folder 4",
     "none but sync_everything, folder 1", ""},
    {"convert", "file 0, file 1, file 2, file 3, file 4, folder 0, folder 1, folder 2, folder 3",
     "none but sync_everything, folder 1, folder 3", ""},
    {"convert_over", "file 0, file 1, file 2, file 3, file 4, folder 0, folder 2, folder 3",
     "none but sync_everything, folder 2, folder 3", "pointer first"},
    {"convert_in_place",
     "file 0, file 1, file 2, file 3, file 4, folder 1, folder 2, folder 4, folder 5, folder 6",
     "none but sync_everything, folder 1, folder 4, folder 6", ""},
};

INSTANTIATE_TEST_SUITE_P(, PowerLossMutants, testing::ValuesIn(kSurvivors),
                         [](const auto& each) { return std::string(each.param.job); });

}  // namespace
}  // namespace isoshard
