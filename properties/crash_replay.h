// The log of a job on a VolatileStorage, applied again step by step: behind each step power may
// fail under every model of what disks lose, and a Judge says what is left. Outcomes are told apart
// by hashes, and each is judged once, also over many logs of one job.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>

#include "checkpoint/volatile_storage.h"
#include "properties/crash_judge.h"

namespace isoshard::properties {

class CrashReplay {
 public:
  // `seeds`: of models that have no end of them, behind each operation. Both outlive the object.
  CrashReplay(const CrashJob& job, Judge& judge, uint64_t first_seed, uint64_t seeds)
      : job_(job), judge_(judge), first_seed_(first_seed), seeds_(seeds) {}

  // The first failure of a crash behind any operation of the log from number `first` on (0: the
  // disk as it was before the log), or "". `ends_well`: behind the log all places must be the new
  // ones, whatever is lost. Adds to `cases`.
  std::string check(const checkpoint::VolatileStorage& storage, size_t first, bool ends_well,
                    int64_t* cases);

  int64_t distinct() const { return static_cast<int64_t>(known_.size()); }

 private:
  std::string check_moment(const checkpoint::VolatileDisk& disk, bool is_end, int64_t* cases);
  const Finding& look(const checkpoint::VolatileDisk& disk, const checkpoint::Crash& crash);

  const CrashJob& job_;
  Judge& judge_;
  uint64_t first_seed_, seeds_;
  uint64_t settled_ = 0;  // places that are the new ones whatever is lost from here on
  std::unordered_map<uint64_t, Finding> known_;
};

}  // namespace isoshard::properties
