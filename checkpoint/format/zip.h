// The zip container as torch writes it (caffe2/serialize/inline_container.cc over miniz):
//
//   | local header | name | extra (zip64?, "FB" fill) | data, 64-byte aligned | descriptor | …
//   | central directory | zip64 end record | zip64 locator | end record |
//
// Every record is stored, never compressed. Reading is strict: the records tile the file, header,
// descriptor and directory agree, and each byte is either covered by a CRC, equal to another
// record's, or what torch always writes there. Writing gives the same bytes for the same records.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/storage.h"

namespace isoshard::checkpoint {

struct ZipRecord {
  std::string name;           // below the archive's folder: "data/0", short enough for no memory
  int64_t header_offset = 0;  // bytes from the start of the file
  int64_t data_offset = 0;
  int64_t size_bytes = 0;
  uint32_t crc32 = 0;
};

struct ZipIndex {
  std::vector<ZipRecord> records;  // in file order
  std::string prefix;              // common first component, without '/'
  bool torch_dialect = true;       // false: written by another zip program, read with a notice
};

// Reads and checks everything but the payloads. Throws Error(kCorrupt, kIncomplete, kHostile).
ZipIndex read_zip_index(const ReadableFile& file);

// Computes where everything stands before any payload byte is known.
class ZipLayout {
 public:
  // `path` with the archive's folder, "archive/data/0". Returns the record's number. Records keep
  // the order of the calls.
  int add(const std::string& path, int64_t size_bytes);

  const ZipRecord& record(int number) const { return records_[static_cast<size_t>(number)]; }
  const std::string& path(int number) const { return paths_[static_cast<size_t>(number)]; }
  int count() const { return static_cast<int>(records_.size()); }

  // The bytes from header_offset to data_offset.
  std::string header(int number) const;
  // The bytes after the payload, which end where the next header begins.
  std::string descriptor(int number, uint32_t crc32) const;
  // Everything from the central directory to the end of the file.
  std::string directory(const std::vector<uint32_t>& crcs) const;
  int64_t directory_offset() const { return cursor_; }

 private:
  std::vector<ZipRecord> records_;
  std::vector<std::string> paths_;  // by record
  int64_t cursor_ = 0;
};

}  // namespace isoshard::checkpoint
