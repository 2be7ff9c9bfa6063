// See error_case.h. The old disk is made once and copied for each run; what the job makes of it
// without errors is the new.
#include "properties/error_case.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <memory>
#include <optional>
#include <set>

#include "checkpoint/failing_storage.h"
#include "checkpoint/publication.h"
#include "checkpoint/volatile_storage.h"
#include "core/error.h"
#include "core/random.h"
#include "properties/crash_judge.h"
#include "properties/crash_replay.h"

namespace isoshard::properties {

using checkpoint::CallFault;
using checkpoint::Crash;
using checkpoint::Durability;
using checkpoint::FailingStorage;
using checkpoint::MemoryStorage;
using checkpoint::StorageCall;
using checkpoint::VolatileDisk;
using checkpoint::VolatileStorage;

namespace {

std::string folder_of(const std::string& path) { return path.substr(0, path.rfind('/')); }

std::unique_ptr<VolatileStorage> disk_of(const CrashJob& job, Storage& contents) {
  auto disk = std::make_unique<VolatileStorage>();
  disk->renames_folders = job.renames_folders;
  copy_disk(contents, *disk);
  disk->begin_log();
  return disk;
}

std::unique_ptr<MemoryStorage> disk_before(const CrashJob& job, uint64_t number) {
  VolatileStorage disk;
  disk.renames_folders = job.renames_folders;
  job.before(disk, number);
  return disk.after_crash(Durability::kEverything, 0);
}

std::optional<ErrorInfo> error_of(const CrashJob& job, Storage& storage, uint64_t number) {
  try {
    job.work(storage, number);
    return {};
  } catch (const Error& error) {
    return error.info();
  }
}

std::string text_of(const ErrorInfo& info) {
  return info.what + " | file " + info.file + " | found " + info.found + " | safe " + info.safe +
         " | next " + info.next;
}

// Under the final name, where a publication in place has not come to its end.
std::vector<std::string> unfinished_places(const CrashJob& job, Storage& storage) {
  std::vector<std::string> unfinished;
  for (const std::string& place : job.places) {
    if (!storage.is_directory(place)) continue;
    if (storage.list(place).empty() || checkpoint::is_unfinished(storage, place)) {
      unfinished.push_back(place);
    }
  }
  return unfinished;
}

// The job on a disk without faults. What lies unfinished under a final name is removed where the
// job refuses to replace it, as its message and `doctor` advise.
std::string fails_again(const CrashJob& job, Storage& storage, uint64_t number) {
  const std::optional<ErrorInfo> refused = error_of(job, storage, number);
  if (!refused) return "";
  const std::vector<std::string> unfinished = unfinished_places(job, storage);
  for (const std::string& place : unfinished) storage.remove_tree(place);
  const std::optional<ErrorInfo> error =
      unfinished.empty() ? refused : error_of(job, storage, number);
  return error ? "Without faults the job fails: " + text_of(*error) : "";
}

bool says_new(const std::string& safe) {
  return std::ranges::any_of(
      std::initializer_list<const char*>{"is whole under its final name", "is published",
                                         "stands under its name", "the checkpoint is there"},
      [&](const char* words) { return safe.find(words) != std::string::npos; });
}

// Files and folders with hidden names beside the places, but for those that a message has named.
int64_t leftovers_beside(const CrashJob& job, Storage& storage, const std::string& told) {
  std::set<std::string> parents;
  for (const std::string& place : job.places) parents.insert(folder_of(place));
  int64_t count = 0;
  for (const std::string& parent : parents) {
    for (const std::string& name : checkpoint::leftovers(storage, parent)) {
      count += told.find(name) == std::string::npos ? 1 : 0;
    }
  }
  return count;
}

// Where folders cannot be renamed, a whole folder is replaced by nothing.
bool may_refuse(const CrashJob& job, uint64_t arrived) {
  return !job.renames_folders && (arrived & 1) != 0;
}

class ErrorRuns {
 public:
  ErrorRuns(const CrashJob& job, const StorageMutant& mutant, const ErrorRange& range)
      : job_(job),
        mutant_(mutant),
        number_(range.number),
        before_(disk_before(job, range.number)),
        behind_(disk_of(job, *before_)) {
    job.work(*behind_, number_);
    const std::unique_ptr<VolatileStorage> disk = disk_of(job, *before_);
    FailingStorage counter(*disk, {});
    MutantStorage way(counter, mutant, job.pointer);
    job.work(way, number_);
    calls_ = counter.calls();
    strict_ = eyes(/*in_place=*/!job.renames_folders, range);
    lenient_ = eyes(/*in_place=*/true, range);
    use(*strict_);
  }

  const std::vector<StorageCall>& calls() const { return calls_; }

  std::string check(const CallFault& fault, ErrorTally* tally) {
    // Where folders are found not to be renamed, a job goes on under the final name.
    use(calls_at(fault) == StorageCall::kRename ? *lenient_ : *strict_);
    const std::unique_ptr<VolatileStorage> disk = disk_of(job_, *before_);
    size_t first = 0;
    FailingStorage failing(*disk, fault, [&] { first = disk->log().size(); });
    MutantStorage way(failing, mutant_, job_.pointer);
    const std::optional<ErrorInfo> told = error_of(job_, way, number_);
    tally->strikes += way.strikes();
    if (failing.failures() == 0) return "";
    ++tally->runs;
    ++tally->cases;
    tally->told += told ? 1 : 0;
    const Finding finding = judge_->judge(*disk);
    const uint64_t arrived = finding.arrived & judge_->changed();
    std::string failure = finding.failure;
    if (failure.empty()) failure = told ? ill_told(*told, fault, arrived) : not_new(arrived);
    if (failure.empty()) failure = littered(fault, *disk, arrived, told ? told->safe : "");
    if (failure.empty()) failure = replay_->check(*disk, first, !told, &tally->cases);
    if (failure.empty()) failure = again(disk.get(), finding.arrived, tally);
    if (failure.empty()) return "";
    return job_.name + " " + std::to_string(number_) + ", call " + std::to_string(fault.at) + " (" +
           name(calls_at(fault)) + "), " + strerrorname_np(fault.error) +
           (fault.forever ? " for ever" : " once") + ": " + failure +
           (told ? " It was told: " + text_of(*told) : "");
  }

 private:
  struct Eyes {
    std::unique_ptr<Judge> judge;
    std::unique_ptr<CrashReplay> replay;
  };

  std::unique_ptr<Eyes> eyes(bool in_place, const ErrorRange& range) const {
    auto made = std::make_unique<Eyes>();
    made->judge = std::make_unique<Judge>(job_, *before_, *behind_, in_place);
    made->replay = std::make_unique<CrashReplay>(job_, *made->judge, range.number, range.seeds);
    return made;
  }

  void use(const Eyes& eyes) {
    judge_ = eyes.judge.get();
    replay_ = eyes.replay.get();
  }

  StorageCall calls_at(const CallFault& fault) const {
    return calls_[static_cast<size_t>(fault.at)];
  }

  std::string not_new(uint64_t arrived) const {
    return arrived == judge_->changed() ? "" : "The job ended well, and the new is not there.";
  }

  std::string ill_told(const ErrorInfo& told, const CallFault& fault, uint64_t arrived) const {
    // An empty `safe` is printed as kNothingPublished, which `is_new` below contradicts.
    if (told.what.empty() || told.file.empty() || told.next.empty()) {
      return "The message lacks what failed, where, or what to do next.";
    }
    const std::string symbol = strerrorname_np(fault.error);
    if ((told.what + told.found).find(symbol) == std::string::npos) {
      return "The message does not name the error.";
    }
    const bool is_new = says_new(told.safe);
    if (is_new && arrived == 0 && judge_->changed() != 0)
      return "The new is told of and not there.";
    if (job_.one_command && arrived != 0 && !is_new) return "The new is there and not told of.";
    return "";
  }

  // A full disk does not hinder the clean-up.
  std::string littered(const CallFault& fault, Storage& disk, uint64_t arrived,
                       const std::string& told) const {
    using Call = StorageCall;
    constexpr Call kOfCleanUp[] = {Call::kRemoveFile, Call::kRemoveTree, Call::kRename,
                                   Call::kExchange,   Call::kList,       Call::kLook};
    const bool is_space = fault.error == ENOSPC || fault.error == EDQUOT;
    const bool may = fault.forever ? !is_space || arrived != 0
                                   : std::ranges::count(kOfCleanUp, calls_at(fault)) > 0;
    const int64_t count = leftovers_beside(job_, disk, told);
    return may || count == 0 ? "" : std::to_string(count) + " leftovers stay without need.";
  }

  std::string again(VolatileStorage* disk, uint64_t arrived, ErrorTally* tally) {
    const std::string failure = fails_again(job_, *disk, number_);
    if (!failure.empty()) return may_refuse(job_, arrived) ? "" : failure;
    const Finding finding = judge_->judge(*disk);
    if (!finding.failure.empty()) return "Given again: " + finding.failure;
    if (const std::string old = not_new(finding.arrived & judge_->changed()); !old.empty()) {
      return "Given again: " + old;
    }
    return replay_->check(*disk, disk->log().size(), /*ends_well=*/true, &tally->cases);
  }

  const CrashJob& job_;
  StorageMutant mutant_;
  uint64_t number_;
  std::unique_ptr<MemoryStorage> before_;
  std::unique_ptr<VolatileStorage> behind_;
  std::vector<StorageCall> calls_;
  std::unique_ptr<Eyes> strict_, lenient_;
  Judge* judge_ = nullptr;
  CrashReplay* replay_ = nullptr;
};

// Whether one of `count` is among the `most` that are run; by chance, and the same for one number.
bool is_drawn(const ErrorRange& range, uint64_t one, size_t count) {
  const auto most = static_cast<uint64_t>(range.most_runs);
  return range.most_runs < 0 || keyed_random(range.number, {one}) % count < most;
}

// Without `all`: one error of each call, once or for ever.
std::vector<CallFault> faults_of(const std::vector<StorageCall>& calls, const ErrorRange& range) {
  std::vector<CallFault> faults;
  for (size_t at = 0; at < calls.size(); ++at) {
    const std::vector<int>& errors = errors_of(calls[at]);
    const uint64_t word = keyed_random(range.number, {at});
    for (size_t i = 0; i < 2 * errors.size(); ++i) {
      if (!range.all && i != word % (2 * errors.size())) continue;
      faults.push_back(
          {.at = static_cast<int64_t>(at), .error = errors[i / 2], .forever = i % 2 == 1});
    }
  }
  std::vector<CallFault> drawn;
  for (size_t i = 0; i < faults.size(); ++i) {
    if (is_drawn(range, 1000 + i, faults.size())) drawn.push_back(faults[i]);
  }
  return drawn;
}

class Clock {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

struct FirstCrash {
  size_t done = 0;  // operations of the log before it
  Crash crash;
};

// Those with different outcomes. What unsynced files with hidden names hold matters to nobody;
// which there are may.
std::vector<FirstCrash> first_crashes(const VolatileStorage& behind, const ErrorRange& range) {
  std::vector<FirstCrash> crashes;
  std::set<uint64_t> known;
  VolatileDisk disk = behind.base();
  const auto every = [](const std::string&) { return true; };
  for (size_t done = 0;; ++done) {
    for (const Durability model : checkpoint::kDurabilities) {
      const bool is_mixed = model == Durability::kLostBlocks || model == Durability::kTornWrite ||
                            model == Durability::kGarbage;
      const auto seeds = static_cast<uint64_t>(disk.seeds_of(model));
      for (uint64_t i = 0; i < (seeds == 0 ? range.seeds : seeds); ++i) {
        const Crash crash{.model = model, .seed = range.number + i};
        const uint64_t hash = disk.hash_after(crash, is_mixed ? is_shown : every);
        if (known.insert(hash).second) crashes.push_back({done, crash});
      }
    }
    if (done == behind.log().size()) return crashes;
    disk.apply(behind.log()[done]);
  }
}

// The job on what a first crash has left, and every second crash.
std::string check_second(const CrashJob& job, const ErrorRange& range, MemoryStorage* survivor,
                         VolatileStorage* behind, ErrorTally* tally) {
  std::unique_ptr<VolatileStorage> disk = disk_of(job, *survivor);
  if (const auto refused = error_of(job, *disk, range.number)) {
    Judge judge(job, *survivor, *behind, !job.renames_folders);
    if (may_refuse(job, judge.judge(*survivor).arrived)) return "";
    for (const std::string& place : unfinished_places(job, *survivor)) {
      survivor->remove_tree(place);
    }
    disk = disk_of(job, *survivor);
    if (const auto error = error_of(job, *disk, range.number)) {
      return "the job fails: " + text_of(*error);
    }
  }
  Judge judge(job, *survivor, *behind, !job.renames_folders);
  const Finding finding = judge.judge(*disk);
  if (!finding.failure.empty()) return finding.failure;
  if ((finding.arrived & judge.changed()) != judge.changed()) return "the new is not there.";
  CrashReplay replay(job, judge, range.number, range.seeds);
  return replay.check(*disk, 0, /*ends_well=*/true, &tally->cases);
}

}  // namespace

ErrorTally check_errors(const CrashJob& job, const StorageMutant& mutant, const ErrorRange& range) {
  ErrorTally tally;
  const Clock clock;
  ErrorRuns runs(job, mutant, range);
  tally.calls = static_cast<int64_t>(runs.calls().size());
  for (const CallFault& fault : faults_of(runs.calls(), range)) {
    tally.failure = runs.check(fault, &tally);
    if (!tally.failure.empty()) break;
  }
  tally.seconds = clock.seconds();
  return tally;
}

ErrorTally check_nested_crashes(const CrashJob& job, const ErrorRange& range) {
  ErrorTally tally;
  const Clock clock;
  const std::unique_ptr<MemoryStorage> before = disk_before(job, range.number);
  const std::unique_ptr<VolatileStorage> behind = disk_of(job, *before);
  job.work(*behind, range.number);
  tally.calls = static_cast<int64_t>(behind->log().size());
  VolatileDisk disk = behind->base();
  size_t done = 0;
  const std::vector<FirstCrash> crashes = first_crashes(*behind, range);
  for (size_t i = 0; i < crashes.size() && tally.failure.empty(); ++i) {
    for (; done < crashes[i].done; ++done) disk.apply(behind->log()[done]);
    if (!is_drawn(range, 2000 + i, crashes.size())) continue;
    ++tally.runs;
    const std::unique_ptr<MemoryStorage> survivor = disk.after_crash(crashes[i].crash);
    const std::string failure = check_second(job, range, survivor.get(), behind.get(), &tally);
    if (failure.empty()) continue;
    tally.failure = job.name + " " + std::to_string(range.number) + ", first crash behind " +
                    std::to_string(done) + " operations, " + name(crashes[i].crash.model) +
                    ", seed " + std::to_string(crashes[i].crash.seed) + "; then " + failure;
  }
  tally.seconds = clock.seconds();
  return tally;
}

}  // namespace isoshard::properties
