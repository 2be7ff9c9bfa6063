// Where the bytes of a blueprint stand in the finished file, and the bytes that are no payload.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "checkpoint/blueprint.h"
#include "checkpoint/format/zip.h"

namespace isoshard::reshard {

// One piece of literal bytes at an offset of the file.
struct Literal {
  int64_t offset_bytes = 0;
  std::string bytes;
};

class TargetFile {
 public:
  explicit TargetFile(const checkpoint::FileBlueprint& blueprint);

  const std::string& path() const { return path_; }
  int64_t size_bytes() const { return size_bytes_; }
  int64_t storage_offset(int storage) const { return offsets_[static_cast<size_t>(storage)]; }

  // What is known before any payload: headers, pickle, JSON, literal storages.
  std::vector<Literal> opening() const { return opening_; }

  // What needs the CRC-32 of each storage: descriptors, serialization id, directory.
  std::vector<Literal> closing(const std::vector<uint32_t>& storage_crcs) const;

 private:
  void lay_out_torch(const checkpoint::FileBlueprint& blueprint);
  void add_record(const std::string& name, const std::string& bytes);

  std::string path_;
  bool torch_ = false;
  checkpoint::ZipLayout zip_;
  std::string prefix_;
  std::vector<int> storage_records_;    // record number of each storage
  std::vector<uint32_t> literal_crcs_;  // by record; of the literal ones
  std::vector<int64_t> offsets_;        // of each storage
  std::vector<Literal> opening_;
  int64_t size_bytes_ = 0;
};

}  // namespace isoshard::reshard
