// A file of torch.save, opened: its pickle as data and its storages as byte ranges. No payload is
// read here. Picture of the bytes: docs/formats/torch_file.md.
#pragma once

#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "checkpoint/format/pickle.h"
#include "checkpoint/format/zip.h"
#include "core/dtype.h"
#include "core/storage.h"

namespace isoshard::checkpoint {

struct StorageEntry {
  std::string key;        // "0", the record is data/0
  std::string type_name;  // "FloatStorage"; "UntypedStorage" for dtypes without a class
  DType dtype = DType::kUInt8;
  std::string location;  // device at the time of the save, "cpu" or "cuda:0"
  int64_t numel = 0;     // may exceed every tensor that views it
};

// A pickle and the storages it names; the same for every file with the same data.pkl.
struct TorchDocument {
  Pickle pickle;
  std::vector<StorageEntry> storages;
  std::unordered_map<NodeId, int> storage_by_node;
};

// Ranks often write the same pickle: each is parsed and kept once. Thread-safe.
class PickleShelf {
 public:
  std::shared_ptr<const TorchDocument> find(const std::string& bytes) const;
  void keep(std::string bytes, std::shared_ptr<const TorchDocument> document);

 private:
  struct Entry {
    std::string bytes;
    std::shared_ptr<const TorchDocument> document;
  };
  mutable std::mutex mutex_;
  std::deque<std::shared_ptr<const Entry>> entries_;  // newest first, a few
};

// A strided view of a storage. Offsets and strides count elements.
struct TensorView {
  DType dtype = DType::kFloat32;
  Shape shape;
  Shape stride;
  int64_t offset = 0;
  int storage = -1;  // number in TorchFile::storages
  bool requires_grad = false;
  NodeId attributes = kNoNode;  // dict of python attributes, of _rebuild_from_type_v2

  bool is_contiguous() const;
};

class TorchFile {
 public:
  // Opens and checks everything but the payloads. Throws Error with the file and the record.
  TorchFile(Storage& storage, const std::string& path, PickleShelf* shelf = nullptr);

  // Frees the pickle and the empty records; only file(), path(), zip() may be asked any more.
  void drop_pickle();

  const std::string& path() const { return path_; }
  const ReadableFile& file() const { return *file_; }
  const TorchDocument& document() const { return *document_; }  // one address: one data.pkl
  const Pickle& pickle() const { return document_->pickle; }
  const ZipIndex& zip() const { return zip_; }
  const std::vector<StorageEntry>& storages() const { return document_->storages; }
  const ZipRecord& record(int storage) const;

  // The tensor that a node describes, or nothing if it is not a tensor. Throws Error(kCorrupt) if
  // the view leaves its storage and Error(kUnsupported) for sparse and quantised tensors.
  std::optional<TensorView> tensor(NodeId node) const;

  // Number of the storage that a persistent-id node names.
  int storage_number(NodeId persistent) const { return document_->storage_by_node.at(persistent); }

  // Byte offset in the file of a tensor's first element.
  int64_t data_offset(const TensorView& view) const;

 private:
  void read_pickle_record(PickleShelf* shelf);
  void check_small_records();
  void read_storages(TorchDocument* document) const;
  void find_records();
  Shape sizes_of(NodeId node) const;
  TensorView view_from(const std::vector<NodeId>& args) const;
  [[noreturn]] void corrupt(const std::string& what, const std::string& entry,
                            const std::string& expected = "", const std::string& found = "") const;
  std::string read_record(const ZipRecord& record) const;

  std::string path_;
  std::unique_ptr<ReadableFile> file_;
  ZipIndex zip_;
  std::shared_ptr<const TorchDocument> document_;
  std::vector<int> records_;  // by storage: number in ZipIndex::records
};

// Name of the storage class that torch uses for a dtype, or "UntypedStorage".
std::string storage_type_name(DType dtype);

// Bytes of an element of that class; 1 of UntypedStorage, 0 of one that torch does not have.
int64_t storage_item_bytes(const std::string& type_name);

// Throws Error(kHostile) where the pickle names what would run a program when Python loads it.
void refuse_hostile(const Pickle& pickle, const std::string& path);

}  // namespace isoshard::checkpoint
