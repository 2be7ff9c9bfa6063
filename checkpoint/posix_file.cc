// pread and pwrite until everything is done; whatever else happens becomes an Error.
#include "checkpoint/posix_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>

#include "checkpoint/posix_error.h"
#include "core/check.h"
#include "core/error.h"
#include "core/mutant.h"

namespace isoshard::checkpoint {
namespace {

constexpr int kStaleReopens = 3;

void require_regular(mode_t mode, const std::string& path) {
  if (S_ISREG(mode) || mutant("device_read")) return;
  if (S_ISDIR(mode)) fail_system(EISDIR, {"Opening the file", path});
  throw Error(ErrorInfo{.code = ErrorCode::kHostile,
                        .what = "What must be a file is none; it was not read.",
                        .file = path,
                        .expected = "a regular file",
                        .found = S_ISFIFO(mode)   ? "a named pipe"
                                 : S_ISSOCK(mode) ? "a socket"
                                                  : "a device",
                        .next = "find out who put it there; a checkpoint has only files"});
}

OpenedPath open_regular(const std::string& path, int flags) {
  struct stat status {};
  // A socket cannot be opened at all, and opening a device can already act on it.
  if (::stat(kernel_path(path), &status) == 0) require_regular(status.st_mode, path);
  OpenedPath opened = open_path(path, flags | O_NONBLOCK, "Opening the file");
  require_regular(opened.status.st_mode, path);
  return opened;
}

class PosixReadableFile final : public ReadableFile {
 public:
  PosixReadableFile(std::string path, OpenedPath opened)
      : path_(std::move(path)),
        descriptor_(std::move(opened.descriptor)),
        size_bytes_(opened.status.st_size) {}

  const std::string& path() const override { return path_; }
  int64_t size_bytes() const override { return size_bytes_; }

  void read_at(int64_t offset, std::span<std::byte> target) const override {
    CHECK(offset >= 0, "read before the beginning of " + path_);
    size_t done = 0;
    while (done < target.size()) {
      const ssize_t count = retry_interrupted([&] {
        return ::pread(descriptor_.number(), target.data() + done, target.size() - done,
                       offset + static_cast<int64_t>(done));
      });
      if (count < 0) {
        fail_system(errno, {.operation = "Reading from the file",
                            .path = path_,
                            .at_byte = offset + static_cast<int64_t>(done)});
      }
      if (count == 0 && mutant("short_read_taken")) return;
      if (count == 0) fail_short(offset + static_cast<int64_t>(target.size()));
      done += static_cast<size_t>(count);
    }
  }

  int64_t next_data(int64_t offset) const override {
    CHECK(offset >= 0, "offset before the beginning of " + path_);
    if (offset >= size_bytes_) return size_bytes_;
    const int64_t found = ::lseek(descriptor_.number(), offset, SEEK_DATA);
    if (found >= 0) return std::min(found, size_bytes_);
    if (errno == EINVAL || errno == ENOTSUP) return offset;  // everything is data
    if (errno != ENXIO) fail_system(errno, {"Looking for data in the file", path_});
    // Past the end of a truncated file is no hole: its bytes are lost, not zeros.
    if (size_now() < size_bytes_ && !mutant("truncated_tail_is_hole")) fail_short(size_bytes_);
    return size_bytes_;
  }

  int64_t next_hole(int64_t offset) const override {
    const int64_t data = next_data(offset);
    if (data >= size_bytes_) return size_bytes_;
    const int64_t found = ::lseek(descriptor_.number(), data, SEEK_HOLE);
    if (found >= 0) return std::min(found, size_bytes_);
    if (errno == EINVAL || errno == ENOTSUP) return size_bytes_;
    if (errno == ENXIO) fail_short(size_bytes_);
    fail_system(errno, {"Looking for holes in the file", path_});
  }

 private:
  int64_t size_now() const {
    struct stat status {};
    if (::fstat(descriptor_.number(), &status) != 0)
      fail_system(errno, {"Measuring the file", path_});
    return status.st_size;
  }

  [[noreturn]] void fail_short(int64_t needed_bytes) const {
    const int64_t now_bytes = size_now();
    const bool changed = now_bytes != size_bytes_;
    throw Error(ErrorInfo{.code = ErrorCode::kCorrupt,
                          .what = changed ? "The file was changed while it was read."
                                          : "The file ends before the bytes it must hold.",
                          .file = path_,
                          .expected = "at least " + std::to_string(needed_bytes) + " bytes",
                          .found = std::to_string(now_bytes) + " bytes",
                          .next = changed ? "wait until nobody writes there, then try again"
                                          : "copy the file again from where it came"});
  }

  std::string path_;
  Descriptor descriptor_;
  int64_t size_bytes_;
};

class PosixWritableFile final : public WritableFile {
 public:
  PosixWritableFile(std::string path, OpenedPath opened)
      : path_(std::move(path)), descriptor_(std::move(opened.descriptor)) {}

  void write_at(int64_t offset, std::span<const std::byte> bytes) override {
    CHECK(offset >= 0, "write before the beginning of " + path_);
    size_t done = 0;
    while (done < bytes.size()) {
      const ssize_t count = retry_interrupted([&] {
        return ::pwrite(number(), bytes.data() + done, bytes.size() - done,
                        offset + static_cast<int64_t>(done));
      });
      // A write of nothing would be repeated for ever.
      if (count <= 0) {
        fail_system(count < 0 ? errno : EIO,
                    {.operation = "Writing to the file",
                     .path = path_,
                     .needed_bytes = static_cast<int64_t>(bytes.size() - done),
                     .at_byte = offset + static_cast<int64_t>(done)});
      }
      done += mutant("short_write_taken") ? bytes.size() : static_cast<size_t>(count);
    }
  }

  void set_size(int64_t size_bytes) override {
    if (retry_interrupted([&] { return ::ftruncate(number(), size_bytes); }) != 0) {
      fail_system(errno, {"Setting the size of the file", path_});
    }
  }

  void sync() override {
    if (mutant("sync_error_once")) sync_error_ = 0;
    if (sync_error_ == 0 && ::fsync(number()) != 0) sync_error_ = errno;
    if (sync_error_ != 0 && !mutant("sync_error_forgotten"))
      fail_system(sync_error_, {"Making the file durable (fsync)", path_});
  }

  void close() override {
    const int result = ::close(number());
    const int error = errno;
    descriptor_.release();  // Linux frees the number also when it reports an error.
    if (result != 0 && !mutant("close_error_ignored"))
      fail_system(error, {"Closing the file", path_});
  }

 private:
  int number() const {
    CHECK(descriptor_.number() >= 0, "use of a closed file: " + path_);
    return descriptor_.number();
  }

  std::string path_;
  Descriptor descriptor_;
  std::atomic<int> sync_error_ = 0;  // stays, so that a failed sync never turns into a success
};

}  // namespace

Descriptor::~Descriptor() {
  if (number_ >= 0) ::close(number_);
}

// A stale handle means that the server replaced the file between look-up and use; looking it up
// again finds the new one.
OpenedPath open_path(const std::string& path, int flags, const char* operation) {
  for (int reopens = 0;; ++reopens) {
    OpenedPath opened;
    opened.descriptor = Descriptor(retry_interrupted(
        [&] { return ::open(kernel_path(path), flags | O_CLOEXEC | O_NOCTTY, 0666); }));
    if (opened.descriptor.number() >= 0 &&
        ::fstat(opened.descriptor.number(), &opened.status) == 0) {
      return opened;
    }
    if (errno != ESTALE || reopens == kStaleReopens) fail_system(errno, {operation, path});
  }
}

std::unique_ptr<ReadableFile> open_posix_read(const std::string& path) {
  return std::make_unique<PosixReadableFile>(path, open_regular(path, O_RDONLY));
}

std::unique_ptr<WritableFile> create_posix(const std::string& path) {
  return std::make_unique<PosixWritableFile>(
      path,
      open_path(path, O_WRONLY | O_CREAT | (mutant("create_replaces") ? 0 : O_EXCL) | O_NOFOLLOW,
                "Creating the file"));
}

std::unique_ptr<WritableFile> open_posix_write(const std::string& path) {
  return std::make_unique<PosixWritableFile>(
      path, open_regular(path, O_WRONLY | (mutant("link_written_through") ? 0 : O_NOFOLLOW)));
}

}  // namespace isoshard::checkpoint
