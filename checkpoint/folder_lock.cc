// See folder_lock.h: the part that asks the operating system.
#include "checkpoint/folder_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <iterator>
#include <thread>

#include "checkpoint/cancel.h"
#include "checkpoint/posix_error.h"
#include "checkpoint/posix_file.h"
#include "checkpoint/posix_storage.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

constexpr int kTries = 100;
constexpr auto kPause = std::chrono::milliseconds(20);
constexpr int64_t kBlockBytes = 512;  // the unit of st_blocks

class PosixFolderLock final : public FolderLock {
 public:
  explicit PosixFolderLock(Descriptor descriptor) : descriptor_(std::move(descriptor)) {}

 private:
  Descriptor descriptor_;  // the lock goes when it is closed
};

// Between the opening and the lock, the holder may have shown the folder or moved it aside.
bool still_has_the_name(int descriptor, const std::string& path) {
  struct stat opened {
  }, named{};
  return ::fstat(descriptor, &opened) == 0 && ::lstat(path.c_str(), &named) == 0 &&
         opened.st_dev == named.st_dev && opened.st_ino == named.st_ino;
}

// Other errors are a failure like any: who went on would write without a lock where there are some.
bool means_no_locks(int error) {
  constexpr int kNone[] = {EOPNOTSUPP, ENOSYS, EINVAL, EBADF, ENOLCK};
  return std::ranges::find(kNone, error) != std::end(kNone);
}

}  // namespace

bool is_shared_file_system(const std::string& path) {
  struct statfs system {};
  if (::statfs(path.c_str(), &system) != 0) return true;
  constexpr uint32_t kLocal[] = {0xEF53 /* ext */,
                                 0x58465342 /* xfs */,
                                 0x9123683E /* btrfs */,
                                 0x01021994 /* tmpfs */,
                                 0x794C7630 /* overlay */,
                                 0x2FC12FC1 /* zfs */,
                                 0xF2F52010 /* f2fs */};
  return std::ranges::find(kLocal, static_cast<uint32_t>(system.f_type)) == std::end(kLocal);
}

LockAnswer lock_folder(Storage& storage, const std::string& path) {
  if (dynamic_cast<PosixStorage*>(&storage) == nullptr) return {};
  OpenedPath opened = open_path(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, "Locking the folder");
  const int number = opened.descriptor.number();
  LockAnswer answer{
      .state = LockAnswer::State::kUnknown, .lock = {}, .shared = is_shared_file_system(path)};
  if (retry_interrupted([&] { return ::flock(number, LOCK_EX | LOCK_NB); }) != 0) {
    const int error = errno;
    if (error != EWOULDBLOCK && !means_no_locks(error))
      fail_system(error, {"Locking the folder", path});
    if (error == EWOULDBLOCK) answer.state = LockAnswer::State::kTheirs;
    return answer;
  }
  if (!still_has_the_name(number, path)) {
    answer.state = LockAnswer::State::kTheirs;
    return answer;
  }
  answer.state = LockAnswer::State::kOurs;
  answer.lock = std::make_unique<PosixFolderLock>(std::move(opened.descriptor));
  return answer;
}

OwnEntry look_at(const std::string& path) {
  struct stat status {};
  if (::lstat(kernel_path(path), &status) != 0) {
    if (errno == ENOENT || errno == ENOTDIR) return {};
    fail_system(errno, {"Looking at the path", path});
  }
  OwnEntry entry{.kind = OwnEntry::Kind::kOther,
                 .size_bytes = status.st_size,
                 .stored_bytes = std::min<int64_t>(status.st_size, status.st_blocks * kBlockBytes),
                 .changed_at = std::max<int64_t>(status.st_mtim.tv_sec, status.st_ctim.tv_sec)};
  if (status.st_uid != ::geteuid()) return entry;
  const auto allows = [&](mode_t mode) { return (status.st_mode & mode) == mode; };
  if (S_ISDIR(status.st_mode) && allows(S_IRWXU)) {
    entry.kind = OwnEntry::Kind::kFolder;
  } else if (S_ISREG(status.st_mode) && status.st_nlink == 1 && allows(S_IRUSR | S_IWUSR)) {
    entry.kind = OwnEntry::Kind::kFile;
  }
  return entry;
}

LockAnswer lock_folder_patiently(Storage& storage, const std::string& path, int tries) {
  for (int tried = 1;; ++tried) {
    throw_if_cancelled();
    LockAnswer answer = lock_folder(storage, path);
    if (answer.state != LockAnswer::State::kTheirs || tried >= tries) return answer;
    std::this_thread::sleep_for(kPause);
  }
}

std::unique_ptr<FolderLock> lock_new_folder(Storage& storage, const std::string& path) {
  LockAnswer answer = lock_folder_patiently(storage, path, kTries);
  if (answer.state != LockAnswer::State::kTheirs) return std::move(answer.lock);
  throw Error(ErrorInfo{.code = ErrorCode::kExists,
                        .what = "Another program holds the lock of a folder that was just made.",
                        .file = path,
                        .safe = "nothing was published",
                        .next = "find out who has it open (lsof), then give the command again"});
}

}  // namespace isoshard::checkpoint
