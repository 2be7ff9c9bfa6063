// A job that changes a disk, and the law of what power loss may leave of it: behind every operation
// and under every model of what disks lose, a reader finds exactly the old or exactly the new.
//
// Not verified here: what readers make of every outcome of a folder that has the mark of one that
// is unfinished (they are given the first few of each job), and disks that lose what was synced.
// Errors that the job is told of: error_case.h.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/storage.h"
#include "properties/mutant_storage.h"

namespace isoshard::properties {

struct CrashJob {
  std::string name;
  bool renames_folders = true;      // false: the job publishes in place
  bool one_command = true;          // false: its places are replaced one by one, each by itself
  std::vector<std::string> places;  // folders and files that the job makes or replaces, each whole
  std::string pointer;              // the one of them whose text names a folder beside it, or ""
  // What is there and durable, and the job; `number` chooses sizes, stages, topologies.
  std::function<void(Storage&, uint64_t number)> before;
  std::function<void(Storage&, uint64_t number)> work;
  // What the program's own reader finds at a path, or "" where it refuses; and where it looks.
  std::function<std::string(Storage&, const std::string& path)> read =
      [](Storage&, const std::string&) { return std::string(); };
  std::string read_at = {};
};

// Names that readers know to be leftovers begin with a dot, but for the mark that tells of a folder
// that it is unfinished.
bool is_shown(const std::string& name);

struct CrashTally {
  int64_t cases = 0;       // prefixes of logs × models × seeds
  int64_t distinct = 0;    // outcomes among them that were read and compared byte by byte
  int64_t operations = 0;  // of all logs
  double seconds = 0;
  int file_syncs = 0;  // that the first run asked for
  int folder_syncs = 0;
  int64_t strikes = 0;  // how often the mutant did something wrong
  std::string failure;  // the first; empty: the law holds
};

struct CrashRange {
  uint64_t first_number = 0;
  int64_t least_cases = 0;
};

// At least so many cases, and never less than every prefix of one log under every model. Jobs after
// the first have other numbers and seeds. Stops at the first failure.
CrashTally check_crashes(const CrashJob& job, const StorageMutant& mutant, const CrashRange& range);

// All jobs, and the one of that name.
std::vector<CrashJob> crash_jobs();
CrashJob crash_job(const std::string& name);

}  // namespace isoshard::properties
