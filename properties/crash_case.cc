// See crash_case.h. A job runs once; its log is then replayed, and each state that power loss could
// leave is told from the others by a hash. Only states not met before are written out and read.
#include "properties/crash_case.h"

#include <chrono>
#include <utility>

#include "checkpoint/volatile_storage.h"
#include "core/check.h"
#include "properties/crash_judge.h"
#include "properties/crash_replay.h"

namespace isoshard::properties {
namespace {

constexpr uint64_t kSeeds = 16;  // of models that have no end of them, at each operation of a log

// One run of a job, judged behind each of its operations.
class CrashRun {
 public:
  CrashRun(const CrashJob& job, const StorageMutant& mutant, uint64_t number, uint64_t first_seed)
      : job_(job), number_(number), first_seed_(first_seed) {
    storage_.renames_folders = job.renames_folders;
    job.before(storage_, number);
    storage_.begin_log();
    MutantStorage way(storage_, mutant, job.pointer);
    job.work(way, number);
    file_syncs_ = way.file_syncs();
    folder_syncs_ = way.folder_syncs();
    strikes_ = way.strikes();
  }

  void check(CrashTally* tally) {
    if (tally->cases == 0) {
      tally->file_syncs = file_syncs_;
      tally->folder_syncs = folder_syncs_;
    }
    tally->strikes += strikes_;
    tally->operations += static_cast<int64_t>(storage_.log().size());
    const std::unique_ptr<checkpoint::MemoryStorage> before = storage_.base().after_crash({});
    Judge judge(job_, *before, storage_, !job_.renames_folders);
    CrashReplay replay(job_, judge, first_seed_, kSeeds);
    tally->failure = replay.check(storage_, 0, /*ends_well=*/true, &tally->cases);
    if (!tally->failure.empty()) {
      tally->failure = job_.name + " " + std::to_string(number_) + ", " + tally->failure;
    }
    tally->distinct += replay.distinct();
  }

 private:
  const CrashJob& job_;
  uint64_t number_, first_seed_;
  checkpoint::VolatileStorage storage_;
  int file_syncs_ = 0, folder_syncs_ = 0;
  int64_t strikes_ = 0;
};

}  // namespace

bool is_shown(const std::string& name) {
  return !name.starts_with(".") || name.starts_with(".isoshard-");
}

CrashTally check_crashes(const CrashJob& job, const StorageMutant& mutant,
                         const CrashRange& range) {
  CrashTally tally;
  const auto start = std::chrono::steady_clock::now();
  for (uint64_t number = range.first_number; tally.failure.empty(); ++number) {
    CrashRun(job, mutant, number, (number - range.first_number) * kSeeds).check(&tally);
    if (tally.cases >= range.least_cases) break;
  }
  tally.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return tally;
}

CrashJob crash_job(const std::string& name) {
  for (CrashJob& job : crash_jobs()) {
    if (job.name == name) return std::move(job);
  }
  CHECK(false, "no such job: " + name);
}

}  // namespace isoshard::properties
