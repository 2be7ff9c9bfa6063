// A rank's way to a disk that all ranks share. Every operation counts among the rank's own (see
// sim/faults.h), and may fail or be its last; so does every read of an open file, among the rank's
// reads. A rank that is dead changes nothing any more, also where its stack unwinds. What a file
// says of its size and holes is no read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/storage.h"

namespace isoshard::sim {

struct Interconnect;

class SimulatedStorage : public Storage {
 public:
  // Both outlive the object, and the object the files that it has opened.
  SimulatedStorage(Storage& disk, Interconnect& network, int rank)
      : disk_(disk), network_(network), rank_(rank) {}

  std::unique_ptr<ReadableFile> open_read(const std::string& path) override;
  std::unique_ptr<WritableFile> create(const std::string& path) override;
  std::unique_ptr<WritableFile> open_write(const std::string& path) override;
  std::vector<DirectoryEntry> list(const std::string& directory) override;
  bool is_file(const std::string& path) override;
  bool is_directory(const std::string& path) override;
  void make_directories(const std::string& path) override;
  void make_directory(const std::string& path) override;
  bool rename_if_absent(const std::string& from, const std::string& to) override;
  void rename_over(const std::string& from, const std::string& to) override;
  void exchange(const std::string& a, const std::string& b) override;
  void remove_file(const std::string& path) override;
  void remove_tree(const std::string& path) override;
  void sync_directory(const std::string& path) override;
  void sync_everything(const std::string& path) override;
  void drop_cache(const std::string& path) override;
  FreeSpace free_space(const std::string& path) override;
  std::string canonical(const std::string& path) override;

  // Runs an operation unless the rank is dead, and what is to go wrong at it. `half` does the part
  // that a death in the midst of it leaves behind.
  template <typename Operation, typename Half>
  auto perform(const std::string& path, Operation operation, Half half);

  // Fills `target` from an open file unless the rank is dead, and what is to go wrong at it. A
  // death in the midst of it leaves the first half filled.
  void read(const ReadableFile& file, int64_t offset, std::span<std::byte> target);

 private:
  Storage& disk_;
  Interconnect& network_;
  int rank_;
};

}  // namespace isoshard::sim
