// What an interrupted publication left, taken up again: found beside the target, locked, and
// cleared of everything that is not a file of the new plan. Nothing in it is trusted: who takes it
// up compares every byte (reshard/target_pool.h).
#pragma once

#include <memory>
#include <set>
#include <string>
#include <vector>

#include "checkpoint/folder_lock.h"
#include "core/storage.h"

namespace isoshard::checkpoint {

struct LeftoverFolder {
  std::string path;
  int64_t stored_bytes = 0;
  std::unique_ptr<FolderLock> lock;
};

struct LeftoverSearch {
  std::unique_ptr<LeftoverFolder> found;  // ours until it goes; null: there is none to take
  std::vector<std::string> passed_over;   // the others, each with the reason
};

// The folder, of those that a publication of `final_path` has left, that holds most bytes, if its
// writer is known to be dead and it is this user's. Where something stands under `final_path` that
// has a manifest, none is taken: it may be what another command has replaced.
LeftoverSearch find_leftover_folder(Storage& storage, const std::string& final_path);

// Removes all but `files` (relative paths) and the folders on the way to them. Links, also hard
// ones, and what is another user's go whatever their name is; none is followed. Returns the number
// of entries that went.
int64_t keep_only(Storage& storage, const std::string& folder, const std::set<std::string>& files);

}  // namespace isoshard::checkpoint
