// The files being written: created when first touched, a bounded number open at a time, finished
// (descriptors, directory, CRCs) when their last transfer is done.
#pragma once

#include <atomic>
#include <list>
#include <memory>
#include <mutex>
#include <vector>

#include "checkpoint/format/crc.h"
#include "reshard/crc_sum.h"
#include "reshard/executor.h"

namespace isoshard::reshard {

class TargetPool {
 public:
  TargetPool(Storage& storage, const ReshardPlan& plan, const std::string& folder,
             const StreamOptions& options);

  // Announces source bytes that will come to a target; all before the first is written.
  void announce(int target, int64_t bytes) {
    targets_[static_cast<size_t>(target)].pending += bytes;
  }
  void finish_untouched();  // targets without any piece

  // One piece of a storage: bytes and their raw CRCs; `zero` pieces stay holes.
  struct Piece {
    int target;
    int storage;
    int64_t offset;  // in the target file
    int64_t size_bytes;
    checkpoint::RawCrcs crcs;
    bool zero;
    std::span<const std::byte> bytes;
  };
  void write(const Piece& piece);
  // The counterpart of announce(); the last bytes finish the file.
  void done(int target, int64_t bytes);

  std::vector<FileHash> hashes() const;
  int64_t bytes_written() const { return bytes_written_; }

 private:
  struct Target {
    std::atomic<int64_t> pending{0};
    std::mutex mutex;  // creation and finishing
    bool created = false;
    std::shared_ptr<WritableFile> open;
    std::vector<CrcSum> storages;
    CrcSum ecma, jones;
  };

  std::shared_ptr<WritableFile> acquire(int target);
  void write_literal(int target, WritableFile& file, const Literal& literal);
  void finish(int target);
  void evict();

  Storage& storage_;
  const ReshardPlan& plan_;
  std::string folder_;
  const StreamOptions& options_;
  std::vector<Target> targets_;
  std::mutex mutex_;     // of the list of open files
  std::list<int> open_;  // least recently used first
  std::atomic<int64_t> bytes_written_{0};
};

}  // namespace isoshard::reshard
