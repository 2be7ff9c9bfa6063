// verify --deep: what lies on the disk, not what memory still holds of it; and every file, also
// those that no reader needs.
//
// Not verified: that the system has followed the advice to drop its pages (a file system in memory
// cannot), nor caches of the drive or of a server.
#pragma once

#include <cstdint>
#include <set>
#include <string>

#include "core/storage.h"

namespace isoshard::reshard {

struct DeepReading {
  int64_t dropped = 0;      // files whose pages the system was asked to drop before they were read
  int64_t kept = 0;         // where asking failed: what memory holds was judged
  int64_t other_files = 0;  // read only to see that they can be: no reader needs them
  bool twice = false;       // the second pass over all files gave the same digest
};

// Asks for every file in the folder and below it.
DeepReading drop_pages(Storage& storage, const std::string& folder);

// Reads every file that is not in `known` (paths inside the folder); throws what reading throws.
// Returns how many there were.
int64_t read_other_files(Storage& storage, const std::string& folder,
                         const std::set<std::string>& known);

}  // namespace isoshard::reshard
