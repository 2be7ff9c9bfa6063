// Storage: the only way to bytes on a disk, so that a simulated one can stand in and faults can be
// placed at every operation. Paths are plain strings with '/' between components.
// Every function throws Error with the path, the operation and what the system said.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace isoshard {

// A file open for reading. Thread-safe: reads carry their offset.
class ReadableFile {
 public:
  virtual ~ReadableFile() = default;
  virtual const std::string& path() const = 0;
  virtual int64_t size_bytes() const = 0;  // as it was when the file was opened
  // Fills `target` from `offset`; a shorter file than that is an Error(kCorrupt).
  virtual void read_at(int64_t offset, std::span<std::byte> target) const = 0;
  // The first offset >= `offset` that may hold data (the rest up to there is a hole, reading as
  // zeros), or size_bytes() when only a hole follows.
  virtual int64_t next_data(int64_t offset) const = 0;
  // The first offset > `offset` where a hole begins; size_bytes() when there is none.
  virtual int64_t next_hole(int64_t offset) const = 0;
};

// A new file open for writing. Thread-safe for disjoint ranges.
class WritableFile {
 public:
  virtual ~WritableFile() = default;
  virtual void write_at(int64_t offset, std::span<const std::byte> bytes) = 0;
  virtual void set_size(int64_t size_bytes) = 0;  // grows by a hole
  virtual void sync() = 0;                        // contents durable
  virtual void close() = 0;                       // reports late errors; further calls are bugs
};

struct DirectoryEntry {
  enum class Kind { kFile, kDirectory, kOther };
  std::string name;
  Kind kind = Kind::kFile;
  int64_t size_bytes = 0;
};

struct FreeSpace {
  int64_t bytes = 0;
  int64_t inodes = 0;  // -1: the file system does not count them
};

class Storage {
 public:
  virtual ~Storage() = default;
  virtual std::unique_ptr<ReadableFile> open_read(const std::string& path) = 0;
  virtual std::unique_ptr<WritableFile> create(const std::string& path) = 0;      // must not exist
  virtual std::unique_ptr<WritableFile> open_write(const std::string& path) = 0;  // must exist
  virtual std::vector<DirectoryEntry> list(const std::string& directory) = 0;     // sorted by name
  virtual bool is_file(const std::string& path) = 0;
  virtual bool is_directory(const std::string& path) = 0;
  virtual void make_directories(
      const std::string& path) = 0;                          // parents too; existing ones are fine
  virtual void make_directory(const std::string& path) = 0;  // must not exist
  virtual bool rename_if_absent(const std::string& from,
                                const std::string& to) = 0;  // false: exists
  virtual void rename_over(const std::string& from, const std::string& to) = 0;
  virtual void exchange(const std::string& a, const std::string& b) = 0;
  virtual void remove_file(const std::string& path) = 0;
  virtual void remove_tree(const std::string& path) = 0;
  virtual void sync_directory(const std::string& path) = 0;
  virtual void sync_everything(const std::string& path) = 0;  // the file system that holds path
  virtual void drop_cache(const std::string& path) = 0;       // so that a read comes from the disk
  virtual FreeSpace free_space(const std::string& path) = 0;
  // The path with symbolic links and ".." resolved, as far as it exists.
  virtual std::string canonical(const std::string& path) = 0;
};

// Whole small file as a string; throws Error(kLimit) above `limit_bytes`.
std::string read_small_file(Storage& storage, const std::string& path, int64_t limit_bytes);

}  // namespace isoshard
