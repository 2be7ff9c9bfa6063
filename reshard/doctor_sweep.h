// The start-up sweep: what interrupted commands of isoshard have left beside a checkpoint, what
// each thing is, and whether it is dead.
//
// A command holds the lock of the folder that it writes (checkpoint/folder_lock.h): where that is
// held, the folder stays, and it is held here while something is removed. As other machines do not
// see the lock, and not every file system has it, "dead" is beside that a conservative guess from
// outside: nothing in it changed for kQuietSeconds, no process of this machine that can be looked
// at has it open or works in it, and no program of isoshard that runs here was given the folder as
// an argument. On a file system that other machines may write to (NFS, Lustre, FUSE and their kin)
// it must be kQuietSharedSeconds, as their processes cannot be seen.
//
// What it does not see: processes of other users, if it may not look at them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/storage.h"

namespace isoshard::reshard {

inline constexpr int64_t kQuietSeconds = 3600, kQuietSharedSeconds = 24 * 3600;

struct Leftover {
  enum class Kind {
    kStaging,     // .name.isoshard-<nonce>/
    kTemporary,   // .latest.isoshard-<nonce>
    kTrash,       // .trash-<nonce>/
    kUnfinished,  // a folder under its final name that holds a mark .isoshard-<nonce>
  };
  Kind kind = Kind::kStaging;
  std::string path;
  int64_t files = 0;
  int64_t size_bytes = 0;
  int64_t quiet_seconds = 0;  // since anything in it changed
  std::string what;           // what it is
  std::string kept;           // why it must stay; empty: it is dead and nobody misses it
  bool removed = false;
};

const char* name(Leftover::Kind kind);  // "staging folder"

// In the folder that is named, or beside the checkpoint that it stands for; sorted by path.
std::vector<Leftover> find_leftovers(Storage& storage, const std::string& source,
                                     const std::string& tag);

// Judges once more, then removes what is dead. Throws what removing throws.
void remove_leftover(Storage& storage, Leftover* leftover);

}  // namespace isoshard::reshard
