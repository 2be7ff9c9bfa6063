// The files of a save, looked at once more by their names before the save is published. A rank that
// says "written" may be wrong: its writer is dead, its error was swallowed, its machine sees
// another folder, or a file of an earlier save lies there. Files are opened anew, so that a network
// file system asks its server (close-to-open), and by another rank than the one that wrote them.
//
// Not verified here: that what was read comes from the disk and not from a cache.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "checkpoint/manifest.h"
#include "core/storage.h"

namespace isoshard::engine {

// What each rank says that it has written, by rank.
using RankInventories = std::vector<std::vector<checkpoint::ManifestFile>>;

// Opens every file. Throws Error(kIncomplete) where one is missing, or has another size, or stands
// in two ranks' inventories, or where a file lies in the folder that no rank has told of; the
// message names the rank and the file. The marks of publication and of NFS are no such files.
void check_names_and_sizes(Storage& storage, const std::string& folder,
                           const RankInventories& inventories);

// Reads the files of one rank, each by its name: the folder is listed by the rank alone that asks
// for names and sizes. Throws Error(kCorrupt) where one has other bytes than were written.
void check_contents(Storage& storage, const std::string& folder, size_t rank,
                    const std::vector<checkpoint::ManifestFile>& files);

}  // namespace isoshard::engine
