// See simulated_storage.h.
#include "sim/simulated_storage.h"

#include <exception>
#include <type_traits>

#include "core/error.h"
#include "sim/interconnect.h"

namespace isoshard::sim {
namespace {

// `entry`: the bytes of the file that were asked for, or nothing.
[[noreturn]] void fail(FaultKind kind, const std::string& path, const std::string& entry = "") {
  ErrorInfo info{
      .code = ErrorCode::kUnreadable, .what = "The disk failed.", .file = path, .entry = entry};
  switch (kind) {
    case FaultKind::kDiskFull:
      info.code = ErrorCode::kNoSpace;
      info.what = "No space is left on the device.";
      info.next = "free space, or save elsewhere";
      break;
    case FaultKind::kQuota:
      info.code = ErrorCode::kNoSpace;
      info.what = "The disk quota is exceeded.";
      info.next = "free space, or have the quota raised";
      break;
    case FaultKind::kReadOnly:
      info.code = ErrorCode::kPermission;
      info.what = "The file system is mounted read-only.";
      info.next = "mount it for writing, or save elsewhere";
      break;
    case FaultKind::kNoPermission:
      info.code = ErrorCode::kPermission;
      info.what = "Permission is denied.";
      info.next = "give this user the right to write there";
      break;
    case FaultKind::kIoError:
      info.what = entry.empty() ? "The disk failed: input/output error."
                                : "Reading from the file failed: input/output error.";
      info.found = "errno 5, EIO";
      info.next =
          "look for disk or network failures in the kernel log (dmesg) before trusting this disk";
      break;
    default:
      info.what = "The file handle is stale (NFS).";
      info.next = "mount the file system again";
      break;
  }
  throw Error(info);
}

}  // namespace

template <typename Operation, typename Half>
auto SimulatedStorage::perform(const std::string& path, Operation operation, Half half) {
  using Result = decltype(operation());
  if (network_.is_dead(rank_)) {
    if (std::uncaught_exceptions() == 0) throw RankDied{rank_};
    if constexpr (std::is_void_v<Result>)
      return;
    else
      return Result{};
  }
  const Fault* fault = network_.next_operation(rank_);
  if (fault != nullptr && fault->kind == FaultKind::kDieBefore) network_.die(rank_);
  if (fault != nullptr && fault->kind == FaultKind::kDieInside) {
    half();
    network_.die(rank_);
  }
  if (fault != nullptr && is_of_disk(fault->kind)) {
    network_.struck.push_back(fault->kind);
    fail(fault->kind, path);
  }
  const bool last = fault != nullptr && fault->kind == FaultKind::kDieAfter;
  if constexpr (std::is_void_v<Result>) {
    operation();
    if (last) network_.die(rank_);
  } else {
    Result result = operation();
    if (last) network_.die(rank_);
    return result;
  }
}

void SimulatedStorage::read(const ReadableFile& file, int64_t offset, std::span<std::byte> target) {
  if (network_.is_dead(rank_)) {
    if (std::uncaught_exceptions() == 0) throw RankDied{rank_};
    return;
  }
  const Fault* fault = network_.next_read(rank_);
  if (fault == nullptr) return file.read_at(offset, target);
  if (fault->kind == FaultKind::kDieBefore) network_.die(rank_);
  if (fault->kind == FaultKind::kDieInside) {
    file.read_at(offset, target.first(target.size() / 2));
    network_.die(rank_);
  }
  if (is_of_reads(fault->kind)) {
    network_.struck.push_back(fault->kind);
    fail(fault->kind, file.path(),
         std::to_string(target.size()) + " bytes at offset " + std::to_string(offset));
  }
  file.read_at(offset, target);
  if (fault->kind == FaultKind::kDieAfter) network_.die(rank_);
}

namespace {

class ReadFile : public ReadableFile {
 public:
  ReadFile(SimulatedStorage& storage, std::unique_ptr<ReadableFile> file)
      : storage_(storage), file_(std::move(file)) {}

  const std::string& path() const override { return file_->path(); }
  int64_t size_bytes() const override { return file_->size_bytes(); }
  void read_at(int64_t offset, std::span<std::byte> target) const override {
    storage_.read(*file_, offset, target);
  }
  int64_t next_data(int64_t offset) const override { return file_->next_data(offset); }
  int64_t next_hole(int64_t offset) const override { return file_->next_hole(offset); }

 private:
  SimulatedStorage& storage_;
  std::unique_ptr<ReadableFile> file_;
};

class CountedFile : public WritableFile {
 public:
  CountedFile(SimulatedStorage& storage, std::unique_ptr<WritableFile> file, std::string path)
      : storage_(storage), file_(std::move(file)), path_(std::move(path)) {}

  void write_at(int64_t offset, std::span<const std::byte> bytes) override {
    storage_.perform(
        path_, [&] { file_->write_at(offset, bytes); },
        [&] { file_->write_at(offset, bytes.first(bytes.size() / 2)); });
  }
  void set_size(int64_t size_bytes) override {
    storage_.perform(
        path_, [&] { file_->set_size(size_bytes); }, [] {});
  }
  void sync() override {
    storage_.perform(
        path_, [&] { file_->sync(); }, [] {});
  }
  void close() override {
    storage_.perform(
        path_, [&] { file_->close(); }, [] {});
  }

 private:
  SimulatedStorage& storage_;
  std::unique_ptr<WritableFile> file_;
  std::string path_;
};

}  // namespace

std::unique_ptr<ReadableFile> SimulatedStorage::open_read(const std::string& path) {
  std::unique_ptr<ReadableFile> file = perform(
      path, [&] { return disk_.open_read(path); }, [] {});
  return std::make_unique<ReadFile>(*this, std::move(file));
}
std::unique_ptr<WritableFile> SimulatedStorage::create(const std::string& path) {
  std::unique_ptr<WritableFile> file = perform(
      path, [&] { return disk_.create(path); }, [&] { disk_.create(path)->close(); });
  return std::make_unique<CountedFile>(*this, std::move(file), path);
}
std::unique_ptr<WritableFile> SimulatedStorage::open_write(const std::string& path) {
  std::unique_ptr<WritableFile> file = perform(
      path, [&] { return disk_.open_write(path); }, [] {});
  return std::make_unique<CountedFile>(*this, std::move(file), path);
}
std::vector<DirectoryEntry> SimulatedStorage::list(const std::string& directory) {
  return perform(
      directory, [&] { return disk_.list(directory); }, [] {});
}
bool SimulatedStorage::is_file(const std::string& path) {
  return perform(
      path, [&] { return disk_.is_file(path); }, [] {});
}
bool SimulatedStorage::is_directory(const std::string& path) {
  return perform(
      path, [&] { return disk_.is_directory(path); }, [] {});
}
void SimulatedStorage::make_directories(const std::string& path) {
  perform(
      path, [&] { disk_.make_directories(path); }, [] {});
}
void SimulatedStorage::make_directory(const std::string& path) {
  perform(
      path, [&] { disk_.make_directory(path); }, [] {});
}
bool SimulatedStorage::rename_if_absent(const std::string& from, const std::string& to) {
  return perform(
      from, [&] { return disk_.rename_if_absent(from, to); }, [] {});
}
void SimulatedStorage::rename_over(const std::string& from, const std::string& to) {
  perform(
      from, [&] { disk_.rename_over(from, to); }, [] {});
}
void SimulatedStorage::exchange(const std::string& a, const std::string& b) {
  perform(
      a, [&] { disk_.exchange(a, b); }, [] {});
}
void SimulatedStorage::remove_file(const std::string& path) {
  perform(
      path, [&] { disk_.remove_file(path); }, [] {});
}
void SimulatedStorage::remove_tree(const std::string& path) {
  perform(
      path, [&] { disk_.remove_tree(path); }, [] {});
}
void SimulatedStorage::sync_directory(const std::string& path) {
  perform(
      path, [&] { disk_.sync_directory(path); }, [] {});
}
void SimulatedStorage::sync_everything(const std::string& path) {
  perform(
      path, [&] { disk_.sync_everything(path); }, [] {});
}
void SimulatedStorage::drop_cache(const std::string& path) {
  perform(
      path, [&] { disk_.drop_cache(path); }, [] {});
}
FreeSpace SimulatedStorage::free_space(const std::string& path) {
  return perform(
      path, [&] { return disk_.free_space(path); }, [] {});
}
std::string SimulatedStorage::canonical(const std::string& path) {
  return perform(
      path, [&] { return disk_.canonical(path); }, [] {});
}

}  // namespace isoshard::sim
