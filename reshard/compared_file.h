// A target file while it is written. Where a run that was interrupted has left one under its name,
// bytes are compared with what must stand there, and only what differs is written.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/storage.h"

namespace isoshard::reshard {

// Thread-safe for disjoint ranges, as WritableFile is.
class ComparedFile {
 public:
  // `there`: the same file open for reading, of its final size; null where it is new and empty.
  ComparedFile(std::unique_ptr<WritableFile> file, std::unique_ptr<ReadableFile> there)
      : file_(std::move(file)), there_(std::move(there)) {}

  // What comparing has found, in bytes.
  struct Found {
    int64_t equal = 0;    // stood there already
    int64_t written = 0;  // was not there, or not right
    int64_t wrong = 0;    // of those written: others stood there, in places that were not empty
  };

  // Both make the range hold what it must; `buffer` is room to read into, the caller's to use
  // again.
  Found put(int64_t offset, std::span<const std::byte> bytes, std::vector<std::byte>* buffer);
  // A range that must be zeros. In a new file it is a hole already.
  Found put_zeros(int64_t offset, int64_t size_bytes, std::vector<std::byte>* buffer);

  void sync() { file_->sync(); }
  void close() { file_->close(); }

 private:
  std::unique_ptr<WritableFile> file_;
  std::unique_ptr<ReadableFile> there_;
};

}  // namespace isoshard::reshard
