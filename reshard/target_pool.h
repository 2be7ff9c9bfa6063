// The files being written: created when first touched, a bounded number open at a time, finished
// (descriptors, directory, CRCs) when their last transfer is done. With StreamOptions::team ranks
// take turns: each file is made by one rank, filled by all, and finished by the one that made it.
// With StreamOptions::resume, files of an interrupted run may lie there: each is made to have its
// size, the dead run's bytes are made durable and dropped from memory, so that comparing sees what
// the disk has, and every byte of it is compared, also those that no piece and no literal covers,
// which must be zeros.
#pragma once

#include <atomic>
#include <list>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "checkpoint/format/crc.h"
#include "reshard/compared_file.h"
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

  // With a team, instead of the two above and of done(), in this order, with a word of all ranks
  // between each: this rank makes its files; all files are there, and pieces may be written; what
  // this rank has written is durable; its files are finished, by sums that are those of all.
  void make_own();
  void take_all_as_made();
  void settle();
  void finish_own();
  // Sums of storages, and behind finish_own() those of whole files, in one order on all ranks.
  std::vector<CrcSum*> storage_sums();
  std::vector<CrcSum*> file_sums();

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
  // `buffer` is room for comparing, the caller's to use again.
  void write(const Piece& piece, std::vector<std::byte>* buffer);
  // The counterpart of announce(); the last bytes finish the file.
  void done(int target, int64_t bytes);

  std::vector<FileHash> hashes() const;
  int64_t bytes_written() const { return bytes_written_; }
  ResumeResult resumed() const;

 private:
  using Ranges = std::vector<std::pair<int64_t, int64_t>>;  // [begin, end)

  struct Target {
    std::atomic<int64_t> pending{0};
    std::mutex mutex;  // creation and finishing
    bool created = false;
    bool resized = false;
    bool found = false;  // it lay there already; comparing goes on until it is finished
    Ranges covered;      // by pieces and literals; with `resume`, until it is created
    std::shared_ptr<ComparedFile> open;
    std::atomic<int> users{0};  // threads at work in it: begun under the mutex
    std::atomic<int64_t> written{0};
    std::vector<CrcSum> storages;
    CrcSum ecma, jones;
  };

  void note_covered();
  std::shared_ptr<ComparedFile> acquire(int target);
  std::shared_ptr<ComparedFile> begin(int target, const std::string& path);
  std::unique_ptr<ComparedFile> take_up(int target, const std::string& path);
  void clear_gaps(int target, ComparedFile& file);
  void write_literal(int target, ComparedFile& file, const Literal& literal);
  void add_to_sums(const Piece& piece);
  void count(int target, const ComparedFile::Found& found);
  void finish(int target);
  void close(int target, bool sync);
  bool is_own(size_t target) const;
  void evict();

  Storage& storage_;
  const ReshardPlan& plan_;
  std::string folder_;
  const StreamOptions& options_;
  std::vector<Target> targets_;
  std::mutex mutex_;     // of the list of open files
  std::list<int> open_;  // least recently used first
  std::atomic<int64_t> bytes_written_{0}, bytes_equal_{0}, bytes_wrong_{0};
};

}  // namespace isoshard::reshard
