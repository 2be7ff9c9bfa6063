// Source-major streaming: chunks of at most 1 MiB, cut at every boundary of transfers, records and
// digested fragments, so that one CRC pass serves all of them.
#include "reshard/executor.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <optional>
#include <thread>
#include <tuple>
#include <unordered_map>

#include "checkpoint/cancel.h"
#include "core/cast.h"
#include "core/check.h"
#include "core/error.h"
#include "core/mutant.h"
#include "core/threads.h"
#include "reshard/crc_sum.h"
#include "reshard/intervals.h"
#include "reshard/target_pool.h"
#include "reshard/team.h"

namespace isoshard::reshard {
namespace {

using checkpoint::FileFragment;
using checkpoint::Leaf;
using checkpoint::RawCrcs;
using checkpoint::ShardedState;

constexpr int64_t kChunkBytes = 1 << 20;
constexpr int64_t kSlackBytes = 64;   // more than any element has
constexpr int64_t kHoleBytes = 4096;  // shorter runs of zeros are written

struct Chunk {
  int file;
  int64_t begin, end;
};

struct Buffers {
  std::vector<std::byte> source = std::vector<std::byte>(kChunkBytes);
  std::vector<std::byte> cast;
  std::vector<std::byte> check;  // of StreamOptions::casts
  std::vector<std::byte> there;  // of StreamOptions::resume
};

// A leaf whose CRC after a cast is wanted.
struct CastSum {
  const Leaf* leaf;
  DType dtype;
  CrcSum ecma, jones;
  std::atomic<bool> whole{true};
};

bool all_zero(std::span<const std::byte> bytes) {
  if (mutant("first_zero_is_all")) return bytes[0] == std::byte{0};
  return bytes[0] == std::byte{0} &&
         std::memcmp(bytes.data(), bytes.data() + 1, bytes.size() - 1) == 0;
}

class Executor {
 public:
  Executor(Storage& storage, const ShardedState& state, const ReshardPlan& plan,
           const std::string& folder, const StreamOptions& options)
      : state_(state),
        plan_(plan),
        options_(options),
        pool_(storage, plan, folder, options),
        leaf_ecma_(state.leaves.size() + options.whole_files.size()),
        leaf_jones_(leaf_ecma_.size()),
        cast_sums_(options.casts.size()),
        jobs_(state.files.size()) {
    for (size_t i = 0; i < cast_sums_.size(); ++i) {
      const LeafCast& wanted = options.casts[i];
      cast_sums_[i].leaf = &state.leaf(wanted.leaf);
      cast_sums_[i].dtype = wanted.dtype;
      cast_of_leaf_[wanted.leaf] = &cast_sums_[i];
    }
  }

  StreamResult run() {
    prepare();
    if (options_.team == nullptr) {
      for (const Transfer& transfer : plan_.transfers)
        pool_.announce(transfer.target_file, transfer.size_bytes);
      pool_.finish_untouched();
      work_through();
      check_records();
    } else {
      work_in_team(*options_.team);
    }
    StreamResult result;
    result.leaves.resize(state_.leaves.size());
    for (int number : options_.digest) {
      const int64_t bytes = state_.leaf(number).size_bytes();
      const auto i = static_cast<size_t>(number);
      result.leaves[i] = {true, leaf_ecma_[i].finish(crc64_ecma_polynomial(), bytes),
                          leaf_jones_[i].finish(crc64_jones_polynomial(), bytes)};
    }
    for (size_t i = 0; i < options_.whole_files.size(); ++i) {
      const size_t number = state_.leaves.size() + i;
      const int64_t bytes = bytes_of(static_cast<int64_t>(number));
      result.whole_files.push_back({true, leaf_ecma_[number].finish(crc64_ecma_polynomial(), bytes),
                                    leaf_jones_[number].finish(crc64_jones_polynomial(), bytes)});
    }
    for (const CastSum& sum : cast_sums_) {
      const int64_t bytes = sum.leaf->size_elements() * item_size_bytes(sum.dtype);
      result.casts.push_back({sum.whole, sum.ecma.finish(crc64_ecma_polynomial(), bytes),
                              sum.jones.finish(crc64_jones_polynomial(), bytes)});
    }
    result.files = pool_.hashes();
    result.bytes_read = bytes_read_;
    result.bytes_written = pool_.bytes_written();
    if (options_.team != nullptr) {
      std::vector<int64_t> counts = {result.bytes_read, result.bytes_written};
      sum_over(*options_.team, &counts);
      result.bytes_read = counts[0];
      result.bytes_written = counts[1];
    }
    result.resumed = pool_.resumed();
    return result;
  }

 private:
  void prepare();
  int64_t bytes_of(int64_t leaf) const;
  void add_touched_records(int file, Ranges* ranges);
  int64_t chunk_end(int file, int64_t at, int64_t end) const;
  void add_chunks(int file, const Ranges& ranges);
  void work_through();
  void work_in_team(Communicator& team);
  void keep_own_chunks(const Communicator& team);
  void join_sums(Communicator& team, std::vector<CrcSum*> sums);
  size_t take_chunk(bool from_front);
  void work(bool from_front, std::exception_ptr* failure, size_t* failed_at);
  void process(const Chunk& chunk, Buffers* buffers);
  void process_piece(const Chunk& chunk, int64_t from, int64_t to, bool hole, Buffers* buffers);
  void add_cast(CastSum* sum, int64_t begin_byte, std::span<const std::byte> bytes,
                Buffers* buffers) const;
  void check_records() const;

  const ShardedState& state_;
  const ReshardPlan& plan_;
  const StreamOptions& options_;
  TargetPool pool_;
  std::vector<CrcSum> leaf_ecma_, leaf_jones_;
  std::vector<CastSum> cast_sums_;
  std::unordered_map<int64_t, CastSum*> cast_of_leaf_;
  std::vector<SourceJob> jobs_;
  std::vector<std::unique_ptr<CrcSum>> record_sums_;
  std::vector<Chunk> chunks_;
  std::atomic<size_t> next_chunk_{0}, taken_from_back_{0}, taken_{0};
  std::atomic<bool> stop_{false};
  std::atomic<int64_t> bytes_done_{0}, bytes_read_{0};
  int64_t bytes_total_ = 0;
};

void Executor::prepare() {
  std::vector<std::vector<Transfer>> transfers(jobs_.size());
  std::vector<std::vector<Span>> spans(jobs_.size());
  for (const Transfer& transfer : plan_.transfers)
    transfers[static_cast<size_t>(transfer.source_file)].push_back(transfer);
  for (int number : options_.digest) {
    const Leaf& leaf = state_.leaf(number);
    const int64_t item = item_size_bytes(leaf.dtype);
    for (const FileFragment& f : leaf.fragments) {
      spans[static_cast<size_t>(f.file)].push_back(
          {f.offset_bytes, f.count * item, number, f.begin * item});
    }
  }
  for (size_t i = 0; i < options_.whole_files.size(); ++i) {
    const auto number = static_cast<int64_t>(state_.leaves.size() + i);
    spans[static_cast<size_t>(options_.whole_files[i])].push_back({0, bytes_of(number), number, 0});
  }
  for (size_t file = 0; file < jobs_.size(); ++file) {
    std::sort(spans[file].begin(), spans[file].end(), [](const Span& a, const Span& b) {
      return std::tie(a.offset, a.leaf, a.leaf_offset) < std::tie(b.offset, b.leaf, b.leaf_offset);
    });
    Ranges ranges;
    for (const Transfer& t : transfers[file])
      ranges.emplace_back(t.source_offset, t.source_offset + t.size_bytes);
    for (const Span& s : spans[file]) ranges.emplace_back(s.offset, s.offset + s.size);
    SourceJob& job = jobs_[file];
    job.transfers.set(std::move(transfers[file]));
    job.spans.set(std::move(spans[file]));
    merge(&ranges);
    if (!ranges.empty() && state_.files[file].torch)
      add_touched_records(static_cast<int>(file), &ranges);
    merge(&ranges);
    add_chunks(static_cast<int>(file), ranges);
  }
}

// Of a leaf, or of a whole file.
int64_t Executor::bytes_of(int64_t leaf) const {
  const auto number = static_cast<size_t>(leaf);
  if (number < state_.leaves.size()) return state_.leaves[number].size_bytes();
  const int file = options_.whole_files[number - state_.leaves.size()];
  return state_.files[static_cast<size_t>(file)].bytes().size_bytes();
}

// Records that a range reaches into are read whole, so that their CRC can be checked.
void Executor::add_touched_records(int file, Ranges* ranges) {
  const Ranges touching = *ranges;
  SourceJob& job = jobs_[static_cast<size_t>(file)];
  for (const checkpoint::ZipRecord& record :
       state_.files[static_cast<size_t>(file)].torch->zip().records) {
    const int64_t begin = record.data_offset, end = begin + record.size_bytes;
    const auto range = std::upper_bound(touching.begin(), touching.end(), begin,
                                        [](int64_t at, const auto& r) { return at < r.second; });
    if (record.size_bytes == 0 || range == touching.end() || range->first >= end) continue;
    record_sums_.push_back(std::make_unique<CrcSum>());
    job.records.push_back({begin, record.size_bytes, &record, record_sums_.back().get()});
    if (!mutant("record_read_in_part")) ranges->emplace_back(begin, end);
  }
}

// Where a chunk from `at` ends: at a multiple of kChunkBytes, or a little before it where that lies
// inside an element that is cast. Elements may begin at any byte (safetensors, foreign zips).
int64_t Executor::chunk_end(int file, int64_t at, int64_t end) const {
  int64_t grid = (at / kChunkBytes + 1) * kChunkBytes;
  if (grid - at < kSlackBytes) grid += kChunkBytes - kSlackBytes;  // a chunk is never empty
  if (grid >= end) return end;
  int64_t stop = grid;
  jobs_[static_cast<size_t>(file)].transfers.overlapping(
      grid - 1, grid + 1, [&](const Transfer& t) {
        if (t.source_dtype == t.target_dtype || t.source_offset >= grid ||
            mutant("chunk_cuts_element"))
          return;
        if (t.source_offset + t.size_bytes <= grid) return;
        const int64_t item = item_size_bytes(t.source_dtype);
        stop = std::min(stop, t.source_offset + (grid - t.source_offset) / item * item);
      });
  return stop;
}

void Executor::add_chunks(int file, const Ranges& ranges) {
  for (const auto& [begin, end] : ranges) {
    for (int64_t at = begin; at < end;) {
      const int64_t stop = chunk_end(file, at, end);
      chunks_.push_back({file, at, stop});
      bytes_total_ += stop - at;
      at = stop;
    }
  }
}

// Half of the workers start at the first chunk, half at the last, and they meet: neighbouring
// chunks mostly go to one target file, where only one write can be under way.
size_t Executor::take_chunk(bool from_front) {
  if (taken_++ + mutant("last_chunk_left") >= chunks_.size()) return chunks_.size();
  return from_front ? next_chunk_++ : chunks_.size() - ++taken_from_back_;
}

void Executor::work(bool from_front, std::exception_ptr* failure, size_t* failed_at) {
  std::optional<Buffers> buffers;
  for (size_t i = take_chunk(from_front); i < chunks_.size() && !stop_;
       i = take_chunk(from_front)) {
    try {
      checkpoint::throw_if_cancelled();
      if (!buffers) buffers.emplace();
      process(chunks_[i], &*buffers);
    } catch (...) {
      *failure = std::current_exception();
      *failed_at = i;
      stop_ = true;
      return;
    }
  }
}

void Executor::work_through() {
  const size_t workers = static_cast<size_t>(std::max(1, options_.workers));
  std::vector<std::exception_ptr> failures(workers);
  std::vector<size_t> failed_at(workers, chunks_.size());
  std::mutex mutex;
  std::condition_variable ended;
  size_t running = workers;
  std::vector<std::thread> threads;
  size_t started = 0;
  for (; started < workers; ++started) {
    const bool more = try_start(&threads, [&, i = started] {
      work(i % 2 == 0, &failures[i], &failed_at[i]);
      const std::lock_guard lock(mutex);
      --running;
      ended.notify_all();
    });
    if (!more) break;
  }
  if (started == 0) work(true, &failures[0], &failed_at[0]);
  {
    std::unique_lock lock(mutex);
    running -= workers - started;
    while (running > 0) {
      ended.wait_for(lock, std::chrono::milliseconds(200));
      if (options_.progress) options_.progress(bytes_done_, bytes_total_);
    }
  }
  for (std::thread& thread : threads) thread.join();
  // Of several failures the one at the lowest offset is told, so that messages repeat.
  const size_t first =
      static_cast<size_t>(std::min_element(failed_at.begin(), failed_at.end()) - failed_at.begin());
  if (failures[first] && !mutant("worker_failure_lost")) std::rethrow_exception(failures[first]);
}

// A run of chunks with a share of all bytes: neighbouring bytes mostly go to neighbouring places.
void Executor::keep_own_chunks(const Communicator& team) {
  const int64_t ranks = team.size(), rank = team.rank();
  std::vector<Chunk> own;
  int64_t before = 0, bytes = 0;
  for (const Chunk& chunk : chunks_) {
    // The rank whose share the chunk's first byte lies in. Shares are of less than 2^63 / ranks.
    const int64_t owner = std::min(ranks - 1, before / std::max<int64_t>(1, bytes_total_ / ranks));
    const int64_t size = chunk.end - chunk.begin;
    before += size;
    if (owner != rank || (mutant("team_share_lost") && owner == ranks - 1)) continue;
    own.push_back(chunk);
    bytes += size;
  }
  chunks_ = std::move(own);
  bytes_total_ = bytes;
}

void Executor::join_sums(Communicator& team, std::vector<CrcSum*> sums) {
  if (mutant("team_sums_unjoined")) return;
  std::vector<uint64_t> words;
  for (const CrcSum* sum : sums) words.push_back(sum->word());
  xor_over(team, &words);
  for (size_t i = 0; i < sums.size(); ++i) sums[i]->set_word(words[i]);
}

// Each phase ends on all ranks or fails on all.
void Executor::work_in_team(Communicator& team) {
  CHECK(!options_.resume, "a team does not resume");
  keep_own_chunks(team);
  together(team, [&] { pool_.make_own(); });
  pool_.take_all_as_made();
  together(team, [&] {
    work_through();
    pool_.settle();
  });
  std::vector<CrcSum*> sums = pool_.storage_sums();
  for (CrcSum& sum : leaf_ecma_) sums.push_back(&sum);
  for (CrcSum& sum : leaf_jones_) sums.push_back(&sum);
  for (const auto& sum : record_sums_) sums.push_back(sum.get());
  std::vector<int64_t> broken;
  for (CastSum& sum : cast_sums_) {
    sums.push_back(&sum.ecma);
    sums.push_back(&sum.jones);
    broken.push_back(sum.whole ? 0 : 1);
  }
  join_sums(team, std::move(sums));
  sum_over(team, &broken);
  for (size_t i = 0; i < cast_sums_.size(); ++i) cast_sums_[i].whole = broken[i] == 0;
  check_records();
  together(team, [&] { pool_.finish_own(); });
  join_sums(team, pool_.file_sums());
}

void Executor::process(const Chunk& chunk, Buffers* buffers) {
  const ReadableFile& file = state_.files[static_cast<size_t>(chunk.file)].bytes();
  const int64_t size = chunk.end - chunk.begin;
  const bool hole = size >= kHoleBytes &&
                    (mutant("data_taken_for_hole") || file.next_data(chunk.begin) >= chunk.end);
  if (!hole) {
    file.read_at(chunk.begin, std::span(buffers->source).first(static_cast<size_t>(size)));
    bytes_read_ += size;
  }
  const SourceJob& job = jobs_[static_cast<size_t>(chunk.file)];
  std::vector<int64_t> cuts = {chunk.begin, chunk.end};
  const auto cut = [&](int64_t at) {
    if (at > chunk.begin && at < chunk.end) cuts.push_back(at);
  };
  job.transfers.overlapping(chunk.begin, chunk.end, [&](const Transfer& t) {
    cut(t.source_offset);
    cut(t.source_offset + t.size_bytes);
  });
  job.spans.overlapping(chunk.begin, chunk.end, [&](const Span& s) {
    cut(s.offset);
    cut(s.offset + s.size);
  });
  for (auto r = std::lower_bound(
           job.records.begin(), job.records.end(), chunk.begin,
           [](const Record&record, int64_t at) { return record.offset + record.size <= at; });
       r != job.records.end() && r->offset < chunk.end; ++r) {
    cut(r->offset);
    cut(r->offset + r->size);
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  for (size_t i = 0; i + 1 < cuts.size(); ++i)
    process_piece(chunk, cuts[i], cuts[i + 1], hole, buffers);
  bytes_done_ += size;
}

void Executor::process_piece(const Chunk& chunk, int64_t from, int64_t to, bool hole,
                             Buffers* buffers) {
  const SourceJob& job = jobs_[static_cast<size_t>(chunk.file)];
  const auto size = static_cast<size_t>(to - from);
  const std::span<const std::byte> bytes =
      std::span(buffers->source).subspan(static_cast<size_t>(from - chunk.begin), size);
  const bool zero = hole || (to - from >= kHoleBytes && all_zero(bytes));
  RawCrcs crcs;
  if (!zero) crcs.update(bytes);
  const auto record =
      std::lower_bound(job.records.begin(), job.records.end(), from,
                       [](const Record& r, int64_t at) { return r.offset + r.size <= at; });
  if (record != job.records.end() && record->offset <= from) {
    record->sum->add(crc32_polynomial(), crcs.crc32, record->offset + record->size - to);
  }
  job.spans.overlapping(from, to, [&](const Span& span) {
    const auto leaf = static_cast<size_t>(span.leaf);
    const int64_t after = bytes_of(span.leaf) - span.leaf_offset - (to - span.offset);
    leaf_ecma_[leaf].add(crc64_ecma_polynomial(), crcs.ecma, after);
    leaf_jones_[leaf].add(crc64_jones_polynomial(), crcs.jones,
                          mutant("crc_pieces_unplaced") ? 0 : after);
    if (zero || cast_of_leaf_.empty()) return;  // zeros stay zeros
    const auto wanted = cast_of_leaf_.find(span.leaf);
    if (wanted != cast_of_leaf_.end())
      add_cast(wanted->second, span.leaf_offset + (from - span.offset), bytes, buffers);
  });
  job.transfers.overlapping(from, to, [&](const Transfer& t) {
    TargetPool::Piece piece{t.target_file, t.storage, 0, 0, crcs, zero, bytes};
    if (t.source_dtype == t.target_dtype) {
      piece.offset = t.target_offset + (from - t.source_offset);
      piece.size_bytes = to - from;
    } else {
      const int64_t source_item = item_size_bytes(t.source_dtype),
                    target_item = item_size_bytes(t.target_dtype);
      CHECK((from - t.source_offset) % source_item == 0, "a piece begins inside an element");
      const int64_t count = (to - from) / source_item;
      piece.offset =
          t.target_offset + (from - t.source_offset) / source_item *
                                (mutant("cast_lands_by_source_size") ? source_item : target_item);
      piece.size_bytes = count * target_item;
      if (!zero) {
        buffers->cast.resize(static_cast<size_t>(piece.size_bytes));
        cast(t.source_dtype, bytes, t.target_dtype, buffers->cast);
        piece.bytes = buffers->cast;
        piece.crcs = RawCrcs{};
        piece.crcs.update(piece.bytes);
      }
    }
    pool_.write(piece, &buffers->there);
    pool_.done(t.target_file, to - from);
  });
}

// `begin_byte` is where the bytes stand in the leaf.
void Executor::add_cast(CastSum* sum, int64_t begin_byte, std::span<const std::byte> bytes,
                        Buffers* buffers) const {
  const int64_t item = item_size_bytes(sum->leaf->dtype), target_item = item_size_bytes(sum->dtype);
  const auto size = static_cast<int64_t>(bytes.size());
  if (begin_byte % item != 0 || size % item != 0) {  // not met in what torch writes
    sum->whole = false;
    return;
  }
  buffers->check.resize(static_cast<size_t>(size / item * target_item));
  cast(sum->leaf->dtype, bytes, sum->dtype, buffers->check);
  RawCrcs crcs;
  crcs.update(buffers->check);
  const int64_t after = (sum->leaf->size_elements() - (begin_byte + size) / item) * target_item;
  sum->ecma.add(crc64_ecma_polynomial(), crcs.ecma, after);
  sum->jones.add(crc64_jones_polynomial(), crcs.jones, after);
}

void Executor::check_records() const {
  for (size_t file = 0; file < jobs_.size(); ++file) {
    for (const Record& record : jobs_[file].records) {
      const uint64_t found = record.sum->finish(crc32_polynomial(), record.size);
      if (found == record.zip->crc32 || mutant("record_crc_skipped")) continue;
      throw Error(
          ErrorInfo{.code = ErrorCode::kCorrupt,
                    .what = "A record's bytes do not fit its CRC: the file is damaged.",
                    .file = state_.files[file].path,
                    .entry = quote(record.zip->name),
                    .expected = checkpoint::hex16(record.zip->crc32).substr(8),
                    .found = checkpoint::hex16(found).substr(8),
                    .next = "restore this file from another copy, or use an older checkpoint"});
    }
  }
}

}  // namespace

StreamResult execute(Storage& storage, const ShardedState& state, const ReshardPlan& plan,
                     const std::string& folder, const StreamOptions& options) {
  return Executor(storage, state, plan, folder, options).run();
}

StreamResult digest_leaves(Storage& storage, const ShardedState& state,
                           const StreamOptions& options) {
  const ReshardPlan nothing;
  return Executor(storage, state, nothing, "", options).run();
}

}  // namespace isoshard::reshard
