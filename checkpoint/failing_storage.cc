// See failing_storage.h.
#include "checkpoint/failing_storage.h"

#include <algorithm>
#include <cerrno>
#include <utility>

#include "checkpoint/posix_error.h"

namespace isoshard::checkpoint {

const char* name(StorageCall call) {
  constexpr const char* kNames[] = {"opening of a file",
                                    "read",
                                    "making of a file",
                                    "opening of a file to write",
                                    "write",
                                    "resize",
                                    "sync of a file",
                                    "close",
                                    "listing",
                                    "look",
                                    "making of a folder",
                                    "renaming",
                                    "exchange",
                                    "removal of a file",
                                    "removal of a folder",
                                    "sync of a folder",
                                    "sync of everything",
                                    "drop of a cache",
                                    "question for free space",
                                    "resolution of a path"};
  return kNames[static_cast<size_t>(call)];
}

const std::vector<int>& errors_of(StorageCall call) {
  static const std::vector<int> kOpen = {EIO, EACCES, ESTALE, EMFILE, ENAMETOOLONG};
  static const std::vector<int> kRead = {EIO, ESTALE};
  static const std::vector<int> kCreate = {EIO,   ENOSPC, EDQUOT, EACCES,
                                           EROFS, ESTALE, EMFILE, ENAMETOOLONG};
  static const std::vector<int> kOpenWrite = {EIO, EACCES, EROFS, ESTALE, EMFILE, ENAMETOOLONG};
  static const std::vector<int> kWrite = {EIO, ENOSPC, EDQUOT, EROFS, ESTALE};
  static const std::vector<int> kClose = {EIO, ENOSPC, EDQUOT, ESTALE};
  static const std::vector<int> kLook = {EIO, EACCES, ESTALE, ENAMETOOLONG};
  static const std::vector<int> kMake = {EIO, ENOSPC, EDQUOT, EACCES, EROFS, ESTALE, ENAMETOOLONG};
  static const std::vector<int> kRename = {EIO,   ENOSPC, EDQUOT, EACCES,
                                           EROFS, ESTALE, EXDEV,  ENAMETOOLONG};
  static const std::vector<int> kRemove = {EIO, EACCES, EROFS, ESTALE};
  static const std::vector<int> kRemoveTree = {EIO, EACCES, EROFS, ESTALE, EMFILE};
  static const std::vector<int> kSyncFolder = {EIO, ENOSPC, EDQUOT, EACCES, EROFS, ESTALE, EMFILE};
  static const std::vector<int> kAsk = {EIO, EACCES, ESTALE};
  using Call = StorageCall;
  switch (call) {
    case Call::kOpenRead:
    case Call::kList:
    case Call::kDropCache:
      return kOpen;
    case Call::kRead:
      return kRead;
    case Call::kCreate:
      return kCreate;
    case Call::kOpenWrite:
      return kOpenWrite;
    case Call::kWrite:
    case Call::kSetSize:
    case Call::kSyncFile:
      return kWrite;
    case Call::kClose:
      return kClose;
    case Call::kLook:
      return kLook;
    case Call::kMakeFolder:
      return kMake;
    case Call::kRename:
    case Call::kExchange:
      return kRename;
    case Call::kRemoveFile:
      return kRemove;
    case Call::kRemoveTree:
      return kRemoveTree;
    case Call::kSyncFolder:
    case Call::kSyncEverything:
      return kSyncFolder;
    case Call::kFreeSpace:
    case Call::kResolve:
      break;
  }
  return kAsk;
}

bool FailingStorage::strikes(StorageCall call) {
  bool is_first = false;
  {
    const std::lock_guard lock(mutex_);
    const auto number = static_cast<int64_t>(calls_.size());
    calls_.push_back(call);
    const bool is_meant =
        fault_.at >= 0 && (fault_.forever ? number >= fault_.at : number == fault_.at);
    if (!is_meant || std::ranges::count(errors_of(call), fault_.error) == 0) return false;
    is_first = failures_++ == 0;
  }
  if (is_first && on_failure_) on_failure_();
  return true;
}

bool FailingStorage::does_half() const {
  return fault_.error == EIO || fault_.error == ENOSPC || fault_.error == EDQUOT;
}

void FailingStorage::pass(StorageCall call, const char* operation, const std::string& path,
                          const std::function<void()>& half) {
  if (!strikes(call)) return;
  if (half && does_half()) half();
  fail_system(fault_.error, {operation, path});
}

class FailingReadFile final : public ReadableFile {
 public:
  FailingReadFile(FailingStorage& storage, std::unique_ptr<ReadableFile> file)
      : storage_(storage), file_(std::move(file)) {}

  const std::string& path() const override { return file_->path(); }
  int64_t size_bytes() const override { return file_->size_bytes(); }
  void read_at(int64_t offset, std::span<std::byte> target) const override {
    storage_.pass(StorageCall::kRead, "Reading from the file", path());
    file_->read_at(offset, target);
  }
  int64_t next_data(int64_t offset) const override { return file_->next_data(offset); }
  int64_t next_hole(int64_t offset) const override { return file_->next_hole(offset); }

 private:
  FailingStorage& storage_;
  std::unique_ptr<ReadableFile> file_;
};

class FailingFile final : public WritableFile {
 public:
  FailingFile(FailingStorage& storage, std::unique_ptr<WritableFile> file, std::string path)
      : storage_(storage), file_(std::move(file)), path_(std::move(path)) {}

  void write_at(int64_t offset, std::span<const std::byte> bytes) override {
    const auto half = [&] { file_->write_at(offset, bytes.first(bytes.size() / 2)); };
    storage_.pass(StorageCall::kWrite, "Writing to the file", path_, half);
    file_->write_at(offset, bytes);
    end_bytes_ = std::max(end_bytes_, offset + static_cast<int64_t>(bytes.size()));
    is_synced_ = false;
  }
  void set_size(int64_t size_bytes) override {
    storage_.pass(StorageCall::kSetSize, "Setting the size of the file", path_);
    file_->set_size(size_bytes);
    end_bytes_ = size_bytes;
    is_synced_ = false;
  }
  void sync() override {
    if (storage_.strikes(StorageCall::kSyncFile)) {
      is_lost_ = true;
      storage_.lost_everything_ = true;  // its pages count as clean from now on
      fail_system(storage_.fault_.error, {"Making the file durable (fsync)", path_});
    }
    is_synced_ = true;
    if (!is_lost_) file_->sync();
  }
  void close() override {
    const bool fails = storage_.strikes(StorageCall::kClose);
    if (fails && !is_synced_) file_->set_size(end_bytes_ / 2);
    file_->close();
    if (fails) fail_system(storage_.fault_.error, {"Closing the file", path_});
  }

 private:
  FailingStorage& storage_;
  std::unique_ptr<WritableFile> file_;
  std::string path_;
  int64_t end_bytes_ = 0;
  bool is_synced_ = true;
  bool is_lost_ = false;
};

std::unique_ptr<ReadableFile> FailingStorage::open_read(const std::string& path) {
  pass(StorageCall::kOpenRead, "Opening the file", path);
  return std::make_unique<FailingReadFile>(*this, base_.open_read(path));
}

std::unique_ptr<WritableFile> FailingStorage::create(const std::string& path) {
  pass(StorageCall::kCreate, "Making the file", path);
  return std::make_unique<FailingFile>(*this, base_.create(path), path);
}

std::unique_ptr<WritableFile> FailingStorage::open_write(const std::string& path) {
  pass(StorageCall::kOpenWrite, "Opening the file", path);
  return std::make_unique<FailingFile>(*this, base_.open_write(path), path);
}

std::vector<DirectoryEntry> FailingStorage::list(const std::string& directory) {
  pass(StorageCall::kList, "Listing the folder", directory);
  return base_.list(directory);
}

bool FailingStorage::is_file(const std::string& path) {
  pass(StorageCall::kLook, "Looking at the path", path);
  return base_.is_file(path);
}

bool FailingStorage::is_directory(const std::string& path) {
  pass(StorageCall::kLook, "Looking at the path", path);
  return base_.is_directory(path);
}

void FailingStorage::make_directories(const std::string& path) {
  pass(StorageCall::kMakeFolder, "Making the folder", path);
  base_.make_directories(path);
}

void FailingStorage::make_directory(const std::string& path) {
  pass(StorageCall::kMakeFolder, "Making the folder", path);
  base_.make_directory(path);
}

bool FailingStorage::rename_if_absent(const std::string& from, const std::string& to) {
  pass(StorageCall::kRename, "Renaming", to);
  return base_.rename_if_absent(from, to);
}

void FailingStorage::rename_over(const std::string& from, const std::string& to) {
  pass(StorageCall::kRename, "Renaming", to);
  base_.rename_over(from, to);
}

void FailingStorage::exchange(const std::string& a, const std::string& b) {
  pass(StorageCall::kExchange, "Exchanging two names", b);
  base_.exchange(a, b);
}

void FailingStorage::remove_file(const std::string& path) {
  pass(StorageCall::kRemoveFile, "Removing the file", path);
  base_.remove_file(path);
}

void FailingStorage::remove_tree(const std::string& path) {
  const auto half = [&] {
    if (!base_.is_directory(path)) return;
    const std::vector<DirectoryEntry> entries = base_.list(path);
    if (!entries.empty()) base_.remove_tree(path + "/" + entries.back().name);
  };
  pass(StorageCall::kRemoveTree, "Removing the folder", path, half);
  base_.remove_tree(path);
}

void FailingStorage::sync_directory(const std::string& path) {
  pass(StorageCall::kSyncFolder, "Making the folder durable (fsync)", path);
  base_.sync_directory(path);
}

void FailingStorage::sync_everything(const std::string& path) {
  if (strikes(StorageCall::kSyncEverything)) {
    lost_everything_ = true;
    fail_system(fault_.error, {"Making the file system durable (syncfs)", path});
  }
  if (!lost_everything_) base_.sync_everything(path);
}

void FailingStorage::drop_cache(const std::string& path) {
  pass(StorageCall::kDropCache, "Opening the path", path);
  base_.drop_cache(path);
}

FreeSpace FailingStorage::free_space(const std::string& path) {
  pass(StorageCall::kFreeSpace, "Asking for the free space", path);
  return base_.free_space(path);
}

std::string FailingStorage::canonical(const std::string& path) {
  pass(StorageCall::kResolve, "Resolving the path", path);
  return base_.canonical(path);
}

}  // namespace isoshard::checkpoint
