// See volatile_storage.h. Each operation is MemoryStorage's, which refuses what cannot be done, and
// then a step of the disk's history.
#include "checkpoint/volatile_storage.h"

#include <utility>

#include "core/error.h"

namespace isoshard::checkpoint {

using Kind = DiskOperation::Kind;
using Makes = DiskOperation::Makes;

class LoggedFile final : public WritableFile {
 public:
  LoggedFile(VolatileStorage& storage, std::unique_ptr<WritableFile> file, int node,
             std::string path)
      : storage_(storage), file_(std::move(file)), node_(node), path_(std::move(path)) {}

  void write_at(int64_t offset, std::span<const std::byte> bytes) override {
    const std::lock_guard lock(storage_.mutex_);
    file_->write_at(offset, bytes);
    storage_.note({.kind = Kind::kWrite,
                   .text = "write of " + std::to_string(bytes.size()) + " bytes to " + path_,
                   .node = node_,
                   .offset_bytes = offset,
                   .bytes = std::make_shared<std::vector<std::byte>>(bytes.begin(), bytes.end())});
  }
  void set_size(int64_t size_bytes) override {
    const std::lock_guard lock(storage_.mutex_);
    file_->set_size(size_bytes);
    storage_.note({.kind = Kind::kResize,
                   .text = "new size of " + path_,
                   .node = node_,
                   .size_bytes = size_bytes});
  }
  void sync() override {
    const std::lock_guard lock(storage_.mutex_);
    file_->sync();
    storage_.note({.kind = Kind::kSyncFile, .text = "sync of " + path_, .node = node_});
  }
  void close() override { file_->close(); }

 private:
  VolatileStorage& storage_;
  std::unique_ptr<WritableFile> file_;
  int node_;
  std::string path_;
};

// The last folder on the way and the name in it; the path is not the root's.
VolatileStorage::Slot VolatileStorage::slot_of(const std::string& path) {
  const std::string whole = canonical(path);
  const size_t slash = whole.rfind('/');
  return {.folder = disk_.node_at(slash == 0 ? "/" : whole.substr(0, slash)),
          .name = whole.substr(slash + 1)};
}

void VolatileStorage::note(DiskOperation operation) {
  disk_.apply(operation);
  log_.push_back(std::move(operation));
}

void VolatileStorage::note_new(const std::string& path, Makes makes) {
  const Slot slot = slot_of(path);
  note({.kind = Kind::kEdit,
        .text = "making of " + path,
        .makes = makes,
        .edits = {{slot.folder, slot.name, disk_.next_node()}}});
}

// What lies inside goes first.
void VolatileStorage::note_removed(int folder, const std::string& name, const std::string& path) {
  const int node = disk_.names_in(folder).at(name);
  while (disk_.is_folder(node) && !disk_.names_in(node).empty()) {
    const std::string inner = disk_.names_in(node).begin()->first;
    note_removed(node, inner, path + "/" + inner);
  }
  note({.kind = Kind::kEdit, .text = "removal of " + path, .edits = {{folder, name, -1}}});
}

void VolatileStorage::note_rename(const std::string& from, const std::string& to) {
  const Slot source = slot_of(from), target = slot_of(to);
  const int node = disk_.node_at(canonical(from));
  if (node == disk_.node_at(canonical(to))) return;
  note({.kind = Kind::kEdit,
        .text = "renaming of " + from + " to " + to,
        .edits = {{source.folder, source.name, -1}, {target.folder, target.name, node}}});
}

void VolatileStorage::require_renames(const std::string& path) {
  if (renames_folders || !is_directory(path)) return;
  throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                        .what = "Folders cannot be renamed here.",
                        .file = path,
                        .next = "write under the final name"});
}

std::unique_ptr<WritableFile> VolatileStorage::create(const std::string& path) {
  const std::lock_guard lock(mutex_);
  std::unique_ptr<WritableFile> file = MemoryStorage::create(path);
  const int node = disk_.next_node();
  note_new(path, Makes::kFile);
  return std::make_unique<LoggedFile>(*this, std::move(file), node, path);
}

std::unique_ptr<WritableFile> VolatileStorage::open_write(const std::string& path) {
  const std::lock_guard lock(mutex_);
  return std::make_unique<LoggedFile>(*this, MemoryStorage::open_write(path), node_at(path), path);
}

void VolatileStorage::make_directories(const std::string& path) {
  const std::lock_guard lock(mutex_);
  MemoryStorage::make_directories(path);
  const std::string whole = canonical(path);
  for (size_t end = whole.find('/', 1); end != std::string::npos; end = whole.find('/', end + 1)) {
    const std::string prefix = whole.substr(0, end);
    if (disk_.node_at(prefix) < 0) note_new(prefix, Makes::kFolder);
  }
  if (disk_.node_at(whole) < 0) note_new(whole, Makes::kFolder);
}

void VolatileStorage::make_directory(const std::string& path) {
  const std::lock_guard lock(mutex_);
  MemoryStorage::make_directory(path);
  note_new(path, Makes::kFolder);
}

bool VolatileStorage::rename_if_absent(const std::string& from, const std::string& to) {
  const std::lock_guard lock(mutex_);
  require_renames(from);
  if (!MemoryStorage::rename_if_absent(from, to)) return false;
  note_rename(from, to);
  return true;
}

void VolatileStorage::rename_over(const std::string& from, const std::string& to) {
  const std::lock_guard lock(mutex_);
  require_renames(from);
  MemoryStorage::rename_over(from, to);
  note_rename(from, to);
}

void VolatileStorage::exchange(const std::string& a, const std::string& b) {
  const std::lock_guard lock(mutex_);
  require_renames(a);
  MemoryStorage::exchange(a, b);
  const Slot first = slot_of(a), second = slot_of(b);
  note({.kind = Kind::kEdit,
        .text = "exchange of " + a + " and " + b,
        .edits = {{first.folder, first.name, node_at(b)},
                  {second.folder, second.name, node_at(a)}}});
}

void VolatileStorage::remove_file(const std::string& path) {
  const std::lock_guard lock(mutex_);
  MemoryStorage::remove_file(path);
  const Slot slot = slot_of(path);
  note_removed(slot.folder, slot.name, path);
}

void VolatileStorage::remove_tree(const std::string& path) {
  const std::lock_guard lock(mutex_);
  MemoryStorage::remove_tree(path);
  const Slot slot = slot_of(path);
  note_removed(slot.folder, slot.name, path);
}

void VolatileStorage::sync_directory(const std::string& path) {
  const std::lock_guard lock(mutex_);
  MemoryStorage::sync_directory(path);
  note({.kind = Kind::kSyncFolder, .text = "sync of folder " + path, .node = node_at(path)});
}

void VolatileStorage::sync_everything(const std::string& path) {
  const std::lock_guard lock(mutex_);
  MemoryStorage::sync_everything(path);
  note({.kind = Kind::kSyncEverything, .text = "sync of everything"});
}

std::unique_ptr<MemoryStorage> VolatileStorage::after_crash(Durability model, uint64_t seed) const {
  const std::lock_guard lock(mutex_);
  return disk_.after_crash({.model = model, .seed = seed});
}

void VolatileStorage::begin_log() {
  const std::lock_guard lock(mutex_);
  disk_.apply({.kind = Kind::kSyncEverything});
  base_ = disk_;
  log_.clear();
}

}  // namespace isoshard::checkpoint
