// What a reader may find on a disk behind a crash or a failure of a job (crash_case.h): each place
// is exactly the old or exactly the new, and nothing else has changed.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "checkpoint/memory_storage.h"
#include "core/storage.h"
#include "properties/crash_case.h"

namespace isoshard::properties {

// Shown files with their bytes, and folders, whose paths end in '/'.
using Tree = std::map<std::string, std::string>;
Tree tree_of(Storage& storage);

// Every file and folder of one disk, hidden ones too, made on another, which has none.
void copy_disk(Storage& from, Storage& to);

struct Finding {
  uint64_t arrived = 0;  // a bit for each place that is the new one
  std::string failure;
};

class Judge {
 public:
  // `before` and `behind`: disks with the old and the new. `in_place`: publications may leave the
  // mark of an unfinished folder, as where folders cannot be renamed.
  Judge(const CrashJob& job, Storage& before, Storage& behind, bool in_place);

  uint64_t all() const { return (uint64_t{1} << job_.places.size()) - 1; }
  uint64_t changed() const;  // places that are not in the end what they were
  Finding judge(Storage& storage);

 private:
  std::string changed_elsewhere(const Tree& tree) const;
  bool is_at_work(const Tree& part, const std::string& place) const;
  std::string torn(const Tree& part, const std::string& place) const;
  std::string misled(const Tree& tree, uint64_t arrived) const;
  std::string misread(Storage& storage, const Tree& tree, uint64_t arrived);
  std::string unlisted(Storage& storage) const;

  const CrashJob& job_;
  bool in_place_;
  Tree old_, new_;
  std::map<uint64_t, int> unfinished_reads_;  // by what has arrived
  std::string old_read_, new_read_;
};

}  // namespace isoshard::properties
