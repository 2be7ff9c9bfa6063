// See crash_case.h. A job runs once; its log is then replayed, and each state that power loss could
// leave is told from the others by a hash. Only states not met before are written out and read.
#include "properties/crash_case.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <unordered_map>

#include "checkpoint/publication.h"
#include "checkpoint/volatile_storage.h"
#include "core/check.h"
#include "core/error.h"

namespace isoshard::properties {

using checkpoint::Crash;
using checkpoint::Durability;
using checkpoint::VolatileDisk;
using checkpoint::VolatileStorage;

namespace {

constexpr uint64_t kSeeds = 16;  // of models that have no end of them, at each operation of a log
constexpr int kUnfinishedReads = 4;

// Shown files and folders; a folder's path ends in '/'.
using Tree = std::map<std::string, std::string>;

void add_tree(Storage& storage, const std::string& folder, Tree* tree) {
  for (const DirectoryEntry& entry : storage.list(folder)) {
    if (!is_shown(entry.name)) continue;
    const std::string path = (folder == "/" ? "" : folder) + "/" + entry.name;
    if (entry.kind == DirectoryEntry::Kind::kDirectory) {
      (*tree)[path + "/"] = "";
      add_tree(storage, path, tree);
    } else {
      (*tree)[path] = read_small_file(storage, path, int64_t{1} << 30);
    }
  }
}

Tree tree_of(Storage& storage) {
  Tree tree;
  add_tree(storage, "/", &tree);
  return tree;
}

bool lies_in(const std::string& path, const std::string& place) {
  return path == place || path.starts_with(place + "/");
}

Tree part_of(const Tree& tree, const std::string& place) {
  Tree part;
  for (const auto& [path, bytes] : tree) {
    if (lies_in(path, place)) part[path] = bytes;
  }
  return part;
}

std::string folder_of(const std::string& path) { return path.substr(0, path.rfind('/')); }

std::string quoted(const std::string& path) { return quote(path.substr(0, 200)); }

// Which path tells two trees apart.
std::string difference(const Tree& found, const Tree& expected) {
  for (const auto& [path, bytes] : expected) {
    const auto other = found.find(path);
    if (other == found.end()) return quoted(path) + " is missing";
    if (other->second != bytes) return quoted(path) + " has other bytes";
  }
  for (const auto& [path, bytes] : found) {
    if (!expected.contains(path)) return quoted(path) + " is too much";
  }
  return "nothing differs";
}

struct Finding {
  uint64_t arrived = 0;  // a bit for each place that is the new one
  std::string failure;
};

class Judge {
 public:
  Judge(const CrashJob& job, Storage& before, Storage& behind)
      : job_(job),
        old_(tree_of(before)),
        new_(tree_of(behind)),
        old_read_(job.read(before, job.read_at)),
        new_read_(job.read(behind, job.read_at)) {
    CHECK(job.read_at.empty() || !new_read_.empty(),
          "no reader takes what this makes: " + job.name);
  }

  uint64_t all() const { return (uint64_t{1} << job_.places.size()) - 1; }

  // Those that are not in the end what they were.
  uint64_t changed() const {
    uint64_t bits = 0;
    for (size_t i = 0; i < job_.places.size(); ++i) {
      const std::string& place = job_.places[i];
      if (part_of(old_, place) != part_of(new_, place)) bits |= uint64_t{1} << i;
    }
    return bits;
  }

  Finding judge(Storage& storage) {
    const Tree tree = tree_of(storage);
    Finding finding{.failure = changed_elsewhere(tree)};
    for (size_t i = 0; i < job_.places.size() && finding.failure.empty(); ++i) {
      const Tree part = part_of(tree, job_.places[i]);
      if (part == part_of(new_, job_.places[i])) finding.arrived |= uint64_t{1} << i;
      finding.failure = torn(part, job_.places[i]);
    }
    if (finding.failure.empty()) finding.failure = misled(tree, finding.arrived);
    if (finding.failure.empty()) finding.failure = misread(storage, tree, finding.arrived);
    if (finding.failure.empty()) finding.failure = unlisted(storage);
    return finding;
  }

 private:
  // Nothing but the places may change; folders on the way to them may appear.
  std::string changed_elsewhere(const Tree& tree) const {
    Tree found = tree, expected = old_;
    std::erase_if(found, [&](const auto& entry) {
      return !old_.contains(entry.first) &&
             std::ranges::any_of(job_.places, [&](const auto& place) {
               return lies_in(entry.first, place) || place.starts_with(entry.first);
             });
    });
    for (const std::string& place : job_.places) {
      const auto inside = [&](const auto& entry) { return lies_in(entry.first, place); };
      std::erase_if(found, inside);
      std::erase_if(expected, inside);
    }
    return found == expected ? "" : "Beside the places, " + difference(found, expected) + ".";
  }

  // In place, a folder may be at work: it has a mark then, or nothing at all.
  bool is_at_work(const Tree& part, const std::string& place) const {
    if (job_.renames_folders || !part.contains(place + "/")) return false;
    const auto mark = part.lower_bound(place + "/.isoshard-");
    return part.size() == 1 ||
           (mark != part.end() && mark->first.starts_with(place + "/.isoshard-"));
  }

  std::string torn(const Tree& part, const std::string& place) const {
    const Tree before = part_of(old_, place), behind = part_of(new_, place);
    if (part == before || part == behind || is_at_work(part, place)) return "";
    return quoted(place) + " is neither the old (" + difference(part, before) + ") nor the new (" +
           difference(part, behind) + ").";
  }

  // The pointer names a folder that is whole, and the new one if it is new itself.
  std::string misled(const Tree& tree, uint64_t arrived) const {
    const auto pointer = tree.find(job_.pointer);
    if (pointer == tree.end()) return "";
    const std::string named = folder_of(job_.pointer) + "/" + pointer->second;
    const Tree part = part_of(tree, named);
    if (part.size() < 2 || is_at_work(part, named)) {
      return quoted(job_.pointer) + " names " + quoted(named) + ", which is not whole.";
    }
    const auto old_pointer = old_.find(job_.pointer);
    const bool is_new = old_pointer == old_.end() || old_pointer->second != pointer->second;
    for (size_t i = 0; i < job_.places.size() && is_new; ++i) {
      if (job_.places[i] == named && (arrived >> i & 1) == 0) {
        return quoted(job_.pointer) + " is new, " + quoted(named) + " is not.";
      }
    }
    return "";
  }

  std::string misread(Storage& storage, const Tree& tree, uint64_t arrived) {
    for (const std::string& place : job_.places) {
      if (!is_at_work(part_of(tree, place), place)) continue;
      if (++unfinished_reads_[arrived] > kUnfinishedReads) return "";
      if (!job_.read(storage, place).empty()) return quoted(place) + " is unfinished, and is read.";
    }
    const std::string found = job_.read(storage, job_.read_at);
    const bool may_be_old = arrived != all(), may_be_new = arrived != 0 || new_read_ == old_read_;
    if ((may_be_old && found == old_read_) || (may_be_new && found == new_read_)) return "";
    return "The reader finds " + quoted(found) + ", not " + quoted(old_read_) + " or " +
           quoted(new_read_) + ".";
  }

  // What is not shown is known for what it is.
  std::string unlisted(Storage& storage) const {
    for (const std::string& place : job_.places) {
      const std::string parent = folder_of(place);
      if (!storage.is_directory(parent)) continue;
      const std::vector<std::string> known = checkpoint::leftovers(storage, parent);
      for (const DirectoryEntry& entry : storage.list(parent)) {
        if (is_shown(entry.name) || std::ranges::count(known, entry.name) > 0) continue;
        return quoted(parent + "/" + entry.name) + " is not known as a leftover.";
      }
    }
    return "";
  }

  const CrashJob& job_;
  Tree old_, new_;
  std::map<uint64_t, int> unfinished_reads_;  // by what has arrived
  std::string old_read_, new_read_;
};

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
    VolatileDisk disk = storage_.base();
    const std::unique_ptr<checkpoint::MemoryStorage> before = disk.after_crash({});
    Judge judge(job_, *before, storage_);
    for (size_t done = 0; tally->failure.empty(); ++done) {
      tally->failure = check_moment(disk, judge, done == storage_.log().size(), tally);
      if (!tally->failure.empty()) {
        tally->failure = job_.name + " " + std::to_string(number_) + ", " + std::to_string(done) +
                         " of " + std::to_string(storage_.log().size()) + " operations done" +
                         (done > 0 ? ", the last: " + storage_.log()[done - 1].text : "") +
                         ", model " + tally->failure;
      }
      if (done == storage_.log().size()) break;
      disk.apply(storage_.log()[done]);
    }
    tally->distinct += static_cast<int64_t>(known_.size());
  }

 private:
  std::string check_moment(const VolatileDisk& disk, Judge& judge, bool is_end, CrashTally* tally) {
    // What is there where all is lost that can be lost will always be there.
    settled_ |=
        look(disk, judge, {.model = Durability::kLostEntries, .seed = 1}).arrived & judge.changed();
    if (is_end) settled_ = judge.changed();
    for (const Durability model : checkpoint::kDurabilities) {
      const auto seeds = static_cast<uint64_t>(disk.seeds_of(model));
      for (uint64_t i = 0; i < (seeds == 0 ? kSeeds : seeds); ++i) {
        const Crash crash{.model = model, .seed = first_seed_ + i};
        const Finding& finding = look(disk, judge, crash);
        ++tally->cases;
        std::string failure = finding.failure;
        for (size_t place = 0; place < job_.places.size() && failure.empty(); ++place) {
          if (((settled_ & ~finding.arrived) >> place & 1) == 0) continue;
          failure = quoted(job_.places[place]) + " is not the new one" +
                    (is_end ? ", and the job has ended well." : ", and was already.");
        }
        if (failure.empty()) continue;
        return name(model) + ", seed " + std::to_string(crash.seed) + ": " + failure;
      }
    }
    return "";
  }

  const Finding& look(const VolatileDisk& disk, Judge& judge, const Crash& crash) {
    const auto [known, is_new] = known_.try_emplace(disk.hash_after(crash, is_shown));
    if (is_new) known->second = judge.judge(*disk.after_crash(crash));
    return known->second;
  }

  const CrashJob& job_;
  uint64_t number_, first_seed_;
  VolatileStorage storage_;
  int file_syncs_ = 0, folder_syncs_ = 0;
  int64_t strikes_ = 0;
  std::unordered_map<uint64_t, Finding> known_;
  uint64_t settled_ = 0;  // places that are the new ones whatever is lost from here on
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
