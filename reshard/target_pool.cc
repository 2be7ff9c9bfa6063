// See target_pool.h.
#include "reshard/target_pool.h"

#include <algorithm>

#include "core/check.h"
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
}

void TargetPool::finish_untouched() {
  for (size_t i = 0; i < targets_.size(); ++i) {
    if (targets_[i].pending == 0) finish(static_cast<int>(i));
  }
}

// The target's mutex is held.
std::shared_ptr<WritableFile> TargetPool::acquire(int number) {
  Target& target = targets_[static_cast<size_t>(number)];
  if (target.open == nullptr) {
    const std::string path = folder_ + "/" + plan_.targets[static_cast<size_t>(number)].path();
    if (target.created) {
      target.open = storage_.open_write(path);
    } else {
      storage_.make_directories(path.substr(0, path.rfind('/')));
      target.open = storage_.create(path);
      target.open->set_size(plan_.targets[static_cast<size_t>(number)].size_bytes());
      target.created = true;
      for (const Literal& literal : plan_.targets[static_cast<size_t>(number)].opening()) {
        write_literal(number, *target.open, literal);
      }
      for (size_t i = 0; i < target.storages.size(); ++i) {
        const std::string& literal =
            plan_.blueprints[static_cast<size_t>(number)].storages[i].literal;
        checkpoint::RawCrcs crcs;
        crcs.update(std::as_bytes(std::span(literal)));
        if (!literal.empty()) target.storages[i].add(crc32_polynomial(), crcs.crc32, 0);
      }
    }
    const std::lock_guard lock(mutex_);
    open_.push_back(number);
  }
  return target.open;
}

// Closes the file that was opened first when too many are open. Skips those in use.
void TargetPool::evict() {
  std::vector<std::shared_ptr<WritableFile>> closing;
  {
    const std::lock_guard lock(mutex_);
    while (static_cast<int>(open_.size()) > options_.open_files) {
      const int number = open_.front();
      open_.pop_front();
      Target& target = targets_[static_cast<size_t>(number)];
      std::unique_lock held(target.mutex, std::try_to_lock);
      if (!held || target.open.use_count() > 1) {
        open_.push_back(number);
        break;
      }
      closing.push_back(std::move(target.open));
      target.open = nullptr;
    }
  }
  for (const auto& file : closing) file->close();
}

void TargetPool::write_literal(int number, WritableFile& file, const Literal& literal) {
  Target& target = targets_[static_cast<size_t>(number)];
  const std::span<const std::byte> bytes = std::as_bytes(std::span(literal.bytes));
  if (bytes.empty()) return;
  file.write_at(literal.offset_bytes, bytes);
  bytes_written_ += static_cast<int64_t>(bytes.size());
  checkpoint::RawCrcs crcs;
  crcs.update(bytes);
  const int64_t after = plan_.targets[static_cast<size_t>(number)].size_bytes() -
                        literal.offset_bytes - static_cast<int64_t>(bytes.size());
  target.ecma.add(crc64_ecma_polynomial(), crcs.ecma, after);
  target.jones.add(crc64_jones_polynomial(), crcs.jones, after);
}

void TargetPool::write(const Piece& piece) {
  Target& target = targets_[static_cast<size_t>(piece.target)];
  if (piece.zero) return;  // adds nothing to any sum, and the file has a hole there
  std::shared_ptr<WritableFile> file;
  {
    const std::lock_guard lock(target.mutex);
    file = acquire(piece.target);
  }
  file->write_at(piece.offset, piece.bytes);
  bytes_written_ += piece.size_bytes;
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
  file.reset();
  evict();
}

void TargetPool::done(int target, int64_t bytes) {
  if ((targets_[static_cast<size_t>(target)].pending -= bytes) == 0) finish(target);
}

void TargetPool::finish(int number) {
  Target& target = targets_[static_cast<size_t>(number)];
  const TargetFile& layout = plan_.targets[static_cast<size_t>(number)];
  const std::lock_guard lock(target.mutex);
  const std::shared_ptr<WritableFile> file = acquire(number);
  std::vector<uint32_t> crcs;
  for (size_t i = 0; i < target.storages.size(); ++i) {
    const int64_t bytes = plan_.blueprints[static_cast<size_t>(number)].storages[i].size_bytes();
    crcs.push_back(static_cast<uint32_t>(target.storages[i].finish(crc32_polynomial(), bytes)));
  }
  for (const Literal& literal : layout.closing(crcs)) write_literal(number, *file, literal);
  if (options_.sync_files) file->sync();
  {
    const std::lock_guard list_lock(mutex_);
    open_.remove(number);
  }
  target.open = nullptr;
  file->close();
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
