// See crash_replay.h.
#include "properties/crash_replay.h"

#include "core/error.h"

namespace isoshard::properties {

using checkpoint::Crash;
using checkpoint::Durability;
using checkpoint::VolatileDisk;
using checkpoint::VolatileStorage;

std::string CrashReplay::check(const VolatileStorage& storage, size_t first, bool ends_well,
                               int64_t* cases) {
  VolatileDisk disk = storage.base();
  settled_ = 0;
  const size_t size = storage.log().size();
  for (size_t done = 0;; ++done) {
    if (done >= first) {
      const std::string failure = check_moment(disk, ends_well && done == size, cases);
      if (!failure.empty()) {
        return std::to_string(done) + " of " + std::to_string(size) + " operations done" +
               (done > 0 ? ", the last: " + storage.log()[done - 1].text : "") + ", model " +
               failure;
      }
    }
    if (done == size) return "";
    disk.apply(storage.log()[done]);
  }
}

std::string CrashReplay::check_moment(const VolatileDisk& disk, bool is_end, int64_t* cases) {
  // What is there where all is lost that can be lost will always be there.
  settled_ |= look(disk, {.model = Durability::kLostEntries, .seed = 1}).arrived & judge_.changed();
  if (is_end) settled_ = judge_.changed();
  for (const Durability model : checkpoint::kDurabilities) {
    const auto seeds = static_cast<uint64_t>(disk.seeds_of(model));
    for (uint64_t i = 0; i < (seeds == 0 ? seeds_ : seeds); ++i) {
      const Crash crash{.model = model, .seed = first_seed_ + i};
      const Finding& finding = look(disk, crash);
      ++*cases;
      std::string failure = finding.failure;
      for (size_t place = 0; place < job_.places.size() && failure.empty(); ++place) {
        if (((settled_ & ~finding.arrived) >> place & 1) == 0) continue;
        failure = quote(job_.places[place]) + " is not the new one" +
                  (is_end ? ", and the job has ended well." : ", and was already.");
      }
      if (failure.empty()) continue;
      return name(model) + ", seed " + std::to_string(crash.seed) + ": " + failure;
    }
  }
  return "";
}

const Finding& CrashReplay::look(const VolatileDisk& disk, const Crash& crash) {
  const auto [known, is_new] = known_.try_emplace(disk.hash_after(crash, is_shown));
  if (is_new) known->second = judge_.judge(*disk.after_crash(crash));
  return known->second;
}

}  // namespace isoshard::properties
