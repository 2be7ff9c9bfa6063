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
  int64_t files = 0;  // regular ones of this user
  std::unique_ptr<FolderLock> lock;
};

struct LeftoverSearch {
  std::unique_ptr<LeftoverFolder> found;  // ours until it goes; null: there is none to take
  std::vector<std::string> passed_over;   // the others, each with the reason
};

// The folder, of those that a publication of `final_path` has left, that holds most bytes, if its
// writer is known to be dead and it is this user's. One that may be what another command has
// replaced is never taken: one with a manifest, and any where what stands under `final_path` has
// one.
LeftoverSearch find_leftover_folder(Storage& storage, const std::string& final_path);

// Where other machines may write, nothing must have changed for so long besides: two mounts of one
// machine may not see each other's locks.
inline constexpr int64_t kQuietSharedLeftoverSeconds = 3600;

// Why a leftover's writer may live; empty where it is dead. `quiet_seconds`: since the last change.
std::string why_its_writer_may_live(const LockAnswer& answer, const std::string& path,
                                    int64_t quiet_seconds);

// Removes all but `files` (relative paths) and the folders on the way to them. Links, also hard
// ones, and what is another user's go whatever their name is; none is followed. Returns the number
// of entries that went.
int64_t keep_only(Storage& storage, const std::string& folder, const std::set<std::string>& files);

}  // namespace isoshard::checkpoint
