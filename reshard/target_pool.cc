// See target_pool.h.
#include "reshard/target_pool.h"

#include <algorithm>

#include "core/check.h"
#include "core/dtype.h"
#include "core/mutant.h"

namespace isoshard::reshard {

TargetPool::TargetPool(Storage& storage, const ReshardPlan& plan, const std::string& folder,
                       const StreamOptions& options)
    : storage_(storage),
      plan_(plan),
      folder_(folder),
      options_(options),
      targets_(plan.targets.size()) {
  for (size_t i = 0; i < targets_.size(); ++i) {
    targets_[i].storages = std::vector<CrcSum>(plan.blueprints[i].storages.size());
  }
  if (options.resume) note_covered();
}

void TargetPool::finish_untouched() {
  for (size_t i = 0; i < targets_.size(); ++i) {
    if (targets_[i].pending == 0) finish(static_cast<int>(i));
  }
}

// With StreamOptions::resume: where pieces and literals will stand.
void TargetPool::note_covered() {
  for (const Transfer& transfer : plan_.transfers) {
    const int64_t bytes = transfer.size_bytes / item_size_bytes(transfer.source_dtype) *
                          item_size_bytes(transfer.target_dtype);
    targets_[static_cast<size_t>(transfer.target_file)].covered.emplace_back(
        transfer.target_offset, transfer.target_offset + bytes);
  }
  for (size_t i = 0; i < targets_.size(); ++i) {
    const auto add = [&](const std::vector<Literal>& literals) {
      for (const Literal& literal : literals) {
        targets_[i].covered.emplace_back(
            literal.offset_bytes,
            literal.offset_bytes + static_cast<int64_t>(literal.bytes.size()));
      }
    };
    add(plan_.targets[i].opening());
    // Where they stand does not depend on the CRCs in them.
    add(plan_.targets[i].closing(std::vector<uint32_t>(plan_.blueprints[i].storages.size())));
  }
}

// The target's mutex is held.
std::shared_ptr<ComparedFile> TargetPool::acquire(int number) {
  Target& target = targets_[static_cast<size_t>(number)];
  if (target.open == nullptr) {
    const std::string path = folder_ + "/" + plan_.targets[static_cast<size_t>(number)].path();
    if (!target.created) {
      target.open = begin(number, path);
    } else {
      target.open = std::make_shared<ComparedFile>(
          storage_.open_write(path), target.found ? storage_.open_read(path) : nullptr);
    }
    const std::lock_guard lock(mutex_);
    open_.push_back(number);
  }
  return target.open;
}

std::shared_ptr<ComparedFile> TargetPool::begin(int number, const std::string& path) {
  Target& target = targets_[static_cast<size_t>(number)];
  const TargetFile& layout = plan_.targets[static_cast<size_t>(number)];
  std::shared_ptr<ComparedFile> file;
  if (options_.resume && storage_.is_file(path)) {
    file = take_up(number, path);
  } else {
    storage_.make_directories(path.substr(0, path.rfind('/')));
    std::unique_ptr<WritableFile> made = storage_.create(path);
    target.created = true;  // by whoever comes here next, should something fail from here on
    made->set_size(layout.size_bytes());
    file = std::make_shared<ComparedFile>(std::move(made), nullptr);
  }
  target.created = true;
  for (const Literal& literal : layout.opening()) write_literal(number, *file, literal);
  if (target.found) clear_gaps(number, *file);
  target.covered = Ranges();
  for (size_t i = 0; i < target.storages.size(); ++i) {
    const std::string& literal = plan_.blueprints[static_cast<size_t>(number)].storages[i].literal;
    checkpoint::RawCrcs crcs;
    crcs.update(std::as_bytes(std::span(literal)));
    if (!literal.empty()) target.storages[i].add(crc32_polynomial(), crcs.crc32, 0);
  }
  return file;
}

// A file of another size is cut, or gets a hole at its end; what it holds is compared all the same.
// A sync that failed once would succeed now, with the bytes in memory alone: they are read from the
// disk therefore, as far as the system heeds that.
std::unique_ptr<ComparedFile> TargetPool::take_up(int number, const std::string& path) {
  Target& target = targets_[static_cast<size_t>(number)];
  const int64_t size = plan_.targets[static_cast<size_t>(number)].size_bytes();
  std::unique_ptr<WritableFile> file = storage_.open_write(path);
  if (storage_.open_read(path)->size_bytes() != size) {
    file->set_size(size);
    target.resized = true;
  }
  storage_.drop_cache(path);
  target.found = true;
  return std::make_unique<ComparedFile>(std::move(file), storage_.open_read(path));
}

void TargetPool::clear_gaps(int number, ComparedFile& file) {
  Ranges& covered = targets_[static_cast<size_t>(number)].covered;
  std::sort(covered.begin(), covered.end());
  std::vector<std::byte> buffer;
  const auto clear = [&](int64_t from, int64_t to) {
    if (from < to) count(number, file.put_zeros(from, to - from, &buffer));
  };
  int64_t at = 0;
  for (const auto& [from, to] : covered) {
    clear(at, from);
    at = std::max(at, to);
  }
  clear(at, plan_.targets[static_cast<size_t>(number)].size_bytes());
}

void TargetPool::count(int number, const ComparedFile::Found& found) {
  targets_[static_cast<size_t>(number)].written += found.written;
  bytes_written_ += found.written;
  bytes_equal_ += found.equal;
  bytes_wrong_ += found.wrong;
}

// Closes the file that was opened first when too many are open. Skips those in use.
void TargetPool::evict() {
  std::vector<std::shared_ptr<ComparedFile>> closing;
  {
    const std::lock_guard lock(mutex_);
    const int most = options_.resume ? std::max(1, options_.open_files / 2) : options_.open_files;
    while (static_cast<int>(open_.size()) > most) {
      const int number = open_.front();
      open_.pop_front();
      Target& target = targets_[static_cast<size_t>(number)];
      std::unique_lock held(target.mutex, std::try_to_lock);
      if (!held || target.users.load(std::memory_order_acquire) > 0) {
        open_.push_back(number);
        break;
      }
      closing.push_back(std::move(target.open));
      target.open = nullptr;
    }
  }
  for (const auto& file : closing) {
    if (options_.team != nullptr) file->sync();
    file->close();
  }
}

void TargetPool::write_literal(int number, ComparedFile& file, const Literal& literal) {
  Target& target = targets_[static_cast<size_t>(number)];
  const std::span<const std::byte> bytes = std::as_bytes(std::span(literal.bytes));
  if (bytes.empty()) return;
  std::vector<std::byte> buffer;
  count(number, file.put(literal.offset_bytes, bytes, &buffer));
  checkpoint::RawCrcs crcs;
  crcs.update(bytes);
  const int64_t after = plan_.targets[static_cast<size_t>(number)].size_bytes() -
                        literal.offset_bytes - static_cast<int64_t>(bytes.size());
  target.ecma.add(crc64_ecma_polynomial(), crcs.ecma, after);
  target.jones.add(crc64_jones_polynomial(), crcs.jones, after);
}

void TargetPool::write(const Piece& piece, std::vector<std::byte>* buffer) {
  Target& target = targets_[static_cast<size_t>(piece.target)];
  // Adds nothing to any sum, and a new file has a hole there.
  if (piece.zero && !options_.resume) return;
  {
    // What a thread did in the file happens before it is closed by another.
    struct InUse {
      std::atomic<int>& users;
      ~InUse() { users.fetch_sub(1, std::memory_order_release); }
    };
    std::unique_lock lock(target.mutex);
    target.users.fetch_add(1, std::memory_order_relaxed);
    const InUse in_use{target.users};
    const std::shared_ptr<ComparedFile> file = acquire(piece.target);
    lock.unlock();
    if (piece.zero) {
      count(piece.target, file->put_zeros(piece.offset, piece.size_bytes, buffer));
    } else {
      count(piece.target, file->put(piece.offset, piece.bytes, buffer));
      add_to_sums(piece);
    }
  }
  evict();
}

void TargetPool::add_to_sums(const Piece& piece) {
  Target& target = targets_[static_cast<size_t>(piece.target)];
  const TargetFile& layout = plan_.targets[static_cast<size_t>(piece.target)];
  const auto& fill = plan_.blueprints[static_cast<size_t>(piece.target)]
                         .storages[static_cast<size_t>(piece.storage)];
  const int64_t end = piece.offset + piece.size_bytes;
  const int64_t storage_end = layout.storage_offset(piece.storage) + fill.size_bytes();
  target.storages[static_cast<size_t>(piece.storage)].add(
      crc32_polynomial(), piece.crcs.crc32, storage_end - end + mutant("storage_crc_shifted"));
  target.ecma.add(crc64_ecma_polynomial(), piece.crcs.ecma, layout.size_bytes() - end);
  target.jones.add(crc64_jones_polynomial(), piece.crcs.jones,
                   layout.size_bytes() - end + mutant("file_hash_shifted"));
}

bool TargetPool::is_own(size_t target) const {
  return target % static_cast<size_t>(options_.team->size()) ==
         static_cast<size_t>(options_.team->rank());
}

void TargetPool::make_own() {
  for (size_t i = 0; i < targets_.size(); ++i) {
    if (!is_own(i)) continue;
    const std::lock_guard lock(targets_[i].mutex);
    acquire(static_cast<int>(i));
    close(static_cast<int>(i), true);
  }
}

void TargetPool::take_all_as_made() {
  for (Target& target : targets_) target.created = true;
}

// Another rank may be on another machine, which sees what is on the disk.
void TargetPool::settle() {
  for (size_t i = 0; i < targets_.size(); ++i) {
    const std::lock_guard lock(targets_[i].mutex);
    if (targets_[i].open != nullptr) close(static_cast<int>(i), true);
  }
}

void TargetPool::finish_own() {
  for (size_t i = 0; i < targets_.size(); ++i) {
    if (is_own(i)) finish(static_cast<int>(i));
  }
}

std::vector<CrcSum*> TargetPool::storage_sums() {
  std::vector<CrcSum*> sums;
  for (Target& target : targets_) {
    for (CrcSum& sum : target.storages) sums.push_back(&sum);
  }
  return sums;
}

std::vector<CrcSum*> TargetPool::file_sums() {
  std::vector<CrcSum*> sums;
  for (Target& target : targets_) {
    sums.push_back(&target.ecma);
    sums.push_back(&target.jones);
  }
  return sums;
}

void TargetPool::done(int target, int64_t bytes) {
  if (options_.team != nullptr) return;
  if ((targets_[static_cast<size_t>(target)].pending -= bytes) == 0) finish(target);
}

void TargetPool::finish(int number) {
  Target& target = targets_[static_cast<size_t>(number)];
  const TargetFile& layout = plan_.targets[static_cast<size_t>(number)];
  const std::lock_guard lock(target.mutex);
  const std::shared_ptr<ComparedFile> file = acquire(number);
  std::vector<uint32_t> crcs;
  for (size_t i = 0; i < target.storages.size(); ++i) {
    const int64_t bytes = plan_.blueprints[static_cast<size_t>(number)].storages[i].size_bytes();
    crcs.push_back(static_cast<uint32_t>(target.storages[i].finish(crc32_polynomial(), bytes)));
  }
  for (const Literal& literal : layout.closing(crcs)) write_literal(number, *file, literal);
  close(number, options_.sync_files || options_.team != nullptr);
}

// The target's mutex is held.
void TargetPool::close(int number, bool sync) {
  Target& target = targets_[static_cast<size_t>(number)];
  const std::shared_ptr<ComparedFile> file = target.open;
  if (sync) file->sync();
  {
    const std::lock_guard list_lock(mutex_);
    open_.remove(number);
  }
  target.open = nullptr;
  file->close();
}

ResumeResult TargetPool::resumed() const {
  ResumeResult result{.bytes_equal = bytes_equal_, .bytes_wrong = bytes_wrong_};
  for (const Target& target : targets_) {
    result.files_found += target.found;
    result.files_equal += target.found && !target.resized && target.written == 0;
  }
  return result;
}

std::vector<FileHash> TargetPool::hashes() const {
  std::vector<FileHash> result;
  for (size_t i = 0; i < targets_.size(); ++i) {
    const int64_t size = plan_.targets[i].size_bytes();
    result.push_back({plan_.targets[i].path(), size,
                      targets_[i].ecma.finish(crc64_ecma_polynomial(), size),
                      targets_[i].jones.finish(crc64_jones_polynomial(), size)});
  }
  return result;
}

}  // namespace isoshard::reshard
