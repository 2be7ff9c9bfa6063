// Stand-ins: what salvage shows the reader in place of a file that is torn or not there, so that
// the ordinary reader, with all its checks, reads the rest. A stand-in has a whole header; of its
// payloads only those are real that `damage` does not name.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/blueprint.h"
#include "checkpoint/deepspeed/model_states.h"
#include "checkpoint/format/torn_file.h"
#include "checkpoint/reading_view.h"

namespace isoshard::reshard {

// Bytes [begin, end) of a file, as the reader sees it, are not proven.
struct Damage {
  int64_t begin = 0;
  int64_t end = 0;
  std::string why;
};

// The contents of a file that is put together from literal bytes and pieces of another; the rest
// reads as zeros.
struct Pieces {
  struct Piece {
    int64_t offset_bytes = 0;
    int64_t size_bytes = 0;
    std::string literal;                        // empty: of `shared`, or else of `source`
    std::shared_ptr<const std::string> shared;  // all of it
    int64_t source_offset = 0;
  };
  int64_t size_bytes = 0;
  std::vector<Piece> pieces;  // sorted, apart
  std::shared_ptr<const ReadableFile> source;
  void read_at(int64_t offset, std::span<std::byte> target) const;
};

struct StandIn {
  std::shared_ptr<const Pieces> contents;
  std::vector<Damage> damage;
  int64_t held_bytes = 0;  // about as much memory as it takes, without the pickle
};

// Where one storage's bytes come from: a record of the source, or a literal, or nowhere (`why`).
struct StorageSource {
  int64_t size_bytes = 0;
  const checkpoint::ZipRecord* record = nullptr;
  std::string literal;
  std::string why;
};

// A file of torch.save under `name` with that pickle and those storages, data/0 first.
StandIn make_stand_in(const std::string& name, std::shared_ptr<const std::string> pickle,
                      const std::vector<StorageSource>& storages,
                      std::shared_ptr<const ReadableFile> source);

// What all stand-ins for files like one sibling share.
struct SiblingForm {
  std::shared_ptr<const checkpoint::TorchFile> file;
  std::shared_ptr<const std::string> pickle;
  std::vector<int64_t> storage_sizes;
};
SiblingForm sibling_form(std::shared_ptr<const checkpoint::TorchFile> sibling);

// A lost file, with the header of a sibling's (same kind, other rank), which fits it unchanged.
// Numbers (storages of 0-d tensors) are the sibling's; nothing in it counts as proven.
StandIn sibling_stand_in(const std::string& name, const SiblingForm& sibling,
                         const std::string& why);

// The same for a partition file of stages 1 and 2, where lengths differ from rank to rank: `model`
// has the shapes, `rank` is the lost one of `ranks`.
struct PartitionRank {
  int rank = 0;
  int ranks = 1;
};
StandIn partition_stand_in(const std::string& name, const checkpoint::TorchFile& sibling,
                           const checkpoint::ModelStates& model, PartitionRank place,
                           const std::string& why);

// A storage for reading, in which some files of one folder are stand-ins.
class StandInStorage final : public checkpoint::ReadingView {
 public:
  StandInStorage(Storage& base, std::string folder)
      : ReadingView(base), folder_(std::move(folder)) {}
  void put(const std::string& name, std::shared_ptr<const Pieces> contents);

  std::unique_ptr<ReadableFile> open_read(const std::string& path) override;
  std::vector<DirectoryEntry> list(const std::string& directory) override;
  bool is_file(const std::string& path) override;

 private:
  std::string folder_;
  std::map<std::string, std::shared_ptr<const Pieces>> files_;  // by path
};

}  // namespace isoshard::reshard
