// See mutant_storage.h.
#include "properties/mutant_storage.h"

#include <optional>
#include <utility>

#include "checkpoint/publication.h"
#include "checkpoint/small_file.h"
#include "core/error.h"

namespace isoshard::properties {
namespace {

std::string name_of(const std::string& path) { return path.substr(path.rfind('/') + 1); }
std::string folder_of(const std::string& path) { return path.substr(0, path.rfind('/')); }

bool is_mark(const std::string& path) { return name_of(path).starts_with(".isoshard-"); }

}  // namespace

class MutantFile final : public WritableFile {
 public:
  MutantFile(MutantStorage& storage, std::unique_ptr<WritableFile> file)
      : storage_(storage), file_(std::move(file)) {}

  void write_at(int64_t offset, std::span<const std::byte> bytes) override {
    if (!storage_.strikes_as(StorageMutant::Kind::kWriteBehindSync)) {
      return unless_told(StorageMutant::Kind::kSwallowedWrite,
                         [&] { file_->write_at(offset, bytes); });
    }
    run_held();
    held_ = Held{offset, {bytes.begin(), bytes.end()}};
  }
  void set_size(int64_t size_bytes) override { file_->set_size(size_bytes); }
  void sync() override {
    const int number = storage_.file_syncs_++;
    if (storage_.strikes_sync(StorageMutant::Kind::kLostFileSync, number)) return;
    if (!storage_.strikes_sync(StorageMutant::Kind::kLateFileSync, number)) {
      return unless_told(
          StorageMutant::Kind::kRetriedSync, [&] { file_->sync(); }, [&] { file_->sync(); });
    }
    storage_.late_.push_back(file_);
    is_late_ = true;
  }
  void close() override {
    run_held();
    if (is_late_) return;
    unless_told(StorageMutant::Kind::kSwallowedClose, [&] { file_->close(); });
  }

 private:
  // The work, and what stands in for its error where the mutant keeps that to itself.
  template <typename Work, typename Instead = void (*)()>
  void unless_told(
      StorageMutant::Kind kind, const Work& work, const Instead& instead = [] {}) {
    try {
      work();
    } catch (const Error& error) {
      if (storage_.strikes_as(StorageMutant::Kind::kMuteError)) {
        throw Error(error.info().code, error.info().what);
      }
      if (!storage_.strikes_as(kind)) throw;
      instead();
    }
  }

  struct Held {
    int64_t offset_bytes;
    std::vector<std::byte> bytes;
  };
  void run_held() {
    if (held_) file_->write_at(held_->offset_bytes, held_->bytes);
    held_.reset();
  }

  MutantStorage& storage_;
  std::shared_ptr<WritableFile> file_;
  std::optional<Held> held_;
  bool is_late_ = false;
};

bool MutantStorage::strikes_as(Kind kind, bool applies) {
  const bool strikes = is(kind) && applies;
  strikes_ += strikes ? 1 : 0;
  return strikes;
}

void MutantStorage::run_late() {
  for (const std::shared_ptr<WritableFile>& file : std::exchange(late_, {})) {
    file->sync();
    file->close();
  }
}

// The folder is about to be published beside the pointer.
void MutantStorage::move_pointer(const std::string& folder) {
  const bool is_beside = name_of(folder)[0] != '.' && folder_of(folder) == folder_of(pointer_);
  if (strikes_as(Kind::kEarlyPointer, is_beside)) {
    checkpoint::replace_small_file(base_, pointer_, name_of(folder));
  }
}

std::string MutantStorage::at(const std::string& path) const {
  const bool is_moved = !moved_from_.empty() && path.starts_with(moved_from_) &&
                        (path.size() == moved_from_.size() || path[moved_from_.size()] == '/');
  return is_moved ? moved_to_ + path.substr(moved_from_.size()) : path;
}

// The second file of a hidden folder is about to be made.
void MutantStorage::publish_early(const std::string& path) {
  const std::string folder = folder_of(path), hidden = name_of(folder);
  const size_t mark = hidden.find(".isoshard-");
  if (!is(Kind::kEarlyPublication) || hidden[0] != '.' || mark == std::string::npos) return;
  const std::string target = folder_of(folder) + "/" + hidden.substr(1, mark - 1);
  if (begun_ == folder && moved_from_.empty() && base_.rename_if_absent(folder, target)) {
    strikes_as(Kind::kEarlyPublication);
    moved_from_ = folder;
    moved_to_ = target;
  }
  begun_ = folder;
}

std::unique_ptr<WritableFile> MutantStorage::create(const std::string& given_path) {
  publish_early(given_path);
  const std::string path = at(given_path);
  std::unique_ptr<WritableFile> file = base_.create(path);
  if (strikes_as(Kind::kLostMark, is_mark(path))) base_.remove_file(path);
  return std::make_unique<MutantFile>(*this, std::move(file));
}

bool MutantStorage::is_file(const std::string& path) {
  return (is(Kind::kLostMark) && is_mark(path)) || base_.is_file(at(path));
}

void MutantStorage::remove_tree(const std::string& path) {
  if (!strikes_as(Kind::kKeptStaging, name_of(path)[0] == '.')) base_.remove_tree(at(path));
}

void MutantStorage::remove_file(const std::string& path) {
  if (is_mark(path)) move_pointer(folder_of(path));
  if (strikes_as(Kind::kKeptStaging, name_of(path)[0] == '.' && !is_mark(path))) return;
  if (!is(Kind::kLostMark) || !is_mark(path)) base_.remove_file(at(path));
}

bool MutantStorage::rename_if_absent(const std::string& from, const std::string& to) {
  move_pointer(to);
  if (!moved_from_.empty() && from == moved_from_) return true;
  const bool is_done = base_.rename_if_absent(from, to);
  run_late();
  return is_done;
}

void MutantStorage::rename_over(const std::string& from, const std::string& to) {
  const bool replaces = base_.is_file(to);
  if (strikes_as(Kind::kTwoStepReplace, replaces)) base_.remove_file(to);
  if (!strikes_as(Kind::kRewrittenFile, replaces)) {
    base_.rename_over(from, to);
    return run_late();
  }
  const std::string text = read_small_file(base_, from, int64_t{1} << 30);
  const std::unique_ptr<WritableFile> file = base_.open_write(to);
  file->set_size(static_cast<int64_t>(text.size()));
  file->write_at(0, std::as_bytes(std::span(text)));
  file->sync();
  file->close();
  base_.remove_file(from);
}

void MutantStorage::exchange(const std::string& a, const std::string& b) {
  if (!moved_from_.empty() && a == moved_from_) return;
  const bool publishes = name_of(a)[0] == '.' && name_of(b)[0] != '.';
  if (publishes) move_pointer(b);
  if (!strikes_as(Kind::kTwoStepExchange, publishes)) {
    base_.exchange(a, b);
    return run_late();
  }
  base_.remove_tree(b);
  base_.rename_if_absent(a, b);
  base_.make_directory(a);  // stands for the old folder, which the caller removes
}

void MutantStorage::sync_directory(const std::string& path) {
  if (!strikes_sync(Kind::kLostFolderSync, folder_syncs_++)) base_.sync_directory(at(path));
}

}  // namespace isoshard::properties
