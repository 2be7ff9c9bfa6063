// VolatileDisk: the disk below VolatileStorage. It holds what programs see and what a power failure
// would leave, and gives the latter under seven models of what disks and file systems lose.
//
//   file     live bytes    durable bytes    writes since its last sync, in order
//   folder   live names    durable names    edits of names, in order; a rename is one edit
//
// A sync of a file makes its bytes durable and no name; a sync of a folder its names, with the
// edits that those build on. What is not modelled: a disk that loses what was synced.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/memory_storage.h"

namespace isoshard::checkpoint {

enum class Durability {
  kEverything,   // D0: the program dies, the disk does not
  kNoData,       // D1: unsynced data are lost, names are kept
  kLostBlocks,   // D2: some unsynced blocks of 512 or 4096 bytes are lost, the size is kept
  kTornWrite,    // D3: a file's last unsynced write ends at a multiple of 512 or 4096 bytes
  kReordered,    // D4: unsynced data are lost, and of the unsynced edits of names any may be kept
  kLostEntries,  // D5: unsynced edits of names are lost; so are unsynced data at odd seeds
  kGarbage,      // D6: unsynced ranges hold noise or what another file holds there
};
inline constexpr Durability kDurabilities[] = {
    Durability::kEverything, Durability::kNoData,    Durability::kLostBlocks,
    Durability::kTornWrite,  Durability::kReordered, Durability::kLostEntries,
    Durability::kGarbage,
};

std::string name(Durability model);  // "D0"

struct Crash {
  Durability model = Durability::kEverything;
  uint64_t seed = 0;
};

// Nodes are files and folders by number; 0 is the root. They are never reused.
struct EntryEdit {
  int folder = 0;
  std::string name;
  int node = -1;  // what the name stands for from now on; -1: nothing
};

// One step of a disk's history, which either happens or does not. The edits of one step are one
// transaction, as those of a rename are.
struct DiskOperation {
  enum class Kind { kEdit, kWrite, kResize, kSyncFile, kSyncFolder, kSyncEverything };
  enum class Makes { kNothing, kFile, kFolder };  // the node next_node() before the edits

  Kind kind = Kind::kSyncEverything;
  std::string text;  // for reports
  int node = -1;     // the file, or the folder of kSyncFolder
  Makes makes = Makes::kNothing;
  std::vector<EntryEdit> edits = {};
  int64_t offset_bytes = 0;                                       // kWrite
  std::shared_ptr<const std::vector<std::byte>> bytes = nullptr;  // kWrite
  int64_t size_bytes = -1;                                        // kResize
};

// A value: copies go their own ways. Not thread-safe, its const functions neither.
class VolatileDisk {
 public:
  VolatileDisk();

  int next_node() const { return static_cast<int>(nodes_.size()); }
  int node_at(const std::string& canonical_path) const;  // as programs see it; -1: none
  bool is_folder(int node) const { return nodes_[static_cast<size_t>(node)].is_folder; }
  const std::map<std::string, int>& names_in(int folder) const {
    return nodes_[static_cast<size_t>(folder)].names.live;
  }

  void apply(const DiskOperation& operation);

  // How many seeds give different disks now: 1, 2, or 0 where there may be any number.
  int seeds_of(Durability model) const;

  // The same for equal trees, whatever lies under names that are not shown; of these the names
  // count, but for the nonces that end them.
  using IsShown = bool (*)(const std::string& name);
  uint64_t hash_after(const Crash& crash, IsShown is_shown) const;
  std::unique_ptr<MemoryStorage> after_crash(const Crash& crash) const;

 private:
  class Survivors;
  using Bytes = std::vector<std::byte>;
  using Names = std::map<std::string, int>;

  struct Contents {
    Bytes bytes;
    mutable std::optional<uint64_t> hash;  // of the bytes, once it was asked for
  };
  struct PendingWrite {
    int64_t offset_bytes = 0;
    std::shared_ptr<const Bytes> bytes;  // none: a change of size
    int64_t size_bytes = -1;
  };
  struct File {
    Contents live, durable;
    std::vector<PendingWrite> pending;  // between durable and live
  };
  struct Folder {
    Names live, durable;  // what lies between them is in edits_
  };
  struct Node {
    bool is_folder = false;
    File file;
    Folder names;
  };
  using Edits = std::vector<EntryEdit>;

  Node& at(int node) { return nodes_[static_cast<size_t>(node)]; }
  const Node& at(int node) const { return nodes_[static_cast<size_t>(node)]; }
  static void apply_write(const PendingWrite& write, Bytes* bytes);
  static bool builds_on(const Edits& later, const Edits& earlier);
  static uint64_t hash_of(const Contents& contents);
  void sync_file(File* file);
  void sync_edits(const std::function<bool(const Edits&)>& is_asked);

  std::vector<Node> nodes_;
  std::vector<Edits> edits_;  // of all folders, not durable, in order
};

}  // namespace isoshard::checkpoint
