// The table that says what every errno means and what to do about it.
#include "checkpoint/posix_error.h"

#include <sys/statvfs.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <limits>

#include "core/error.h"
#include "core/mutant.h"

namespace isoshard::checkpoint {
namespace {

struct Explanation {
  int error;
  ErrorCode code;
  const char* reason;
  const char* next;
};

constexpr Explanation kExplanations[] = {
    {ENOSPC, ErrorCode::kNoSpace, "no space left on device",
     "free space on this file system, or choose a target on another one"},
    {EDQUOT, ErrorCode::kNoSpace, "the disk quota is used up",
     "remove files of yours (quota -s shows the limit), or choose a target elsewhere"},
    {EACCES, ErrorCode::kPermission, "permission denied",
     "check who may use the path and the folders above it (ls -ld)"},
    {EPERM, ErrorCode::kPermission, "operation not permitted",
     "check the owner (ls -l) and the attributes (lsattr) of the path"},
    {EROFS, ErrorCode::kPermission, "the file system is read-only",
     "mount it for writing, or choose a target on another file system"},
    {ENOENT, ErrorCode::kNotFound, "no such file or folder", "check the path (ls)"},
    {EEXIST, ErrorCode::kExists, "the name is already taken", "choose another target"},
    {ENOTEMPTY, ErrorCode::kExists, "the folder is not empty",
     "see whether another program writes into it (lsof +D), then try again"},
    {ENOTDIR, ErrorCode::kUnreadable, "a part of the path is a file, not a folder",
     "check each folder of the path (ls -ld)"},
    {EISDIR, ErrorCode::kUnreadable, "it is a folder, not a file", "name a file inside it"},
    {ELOOP, ErrorCode::kUnreadable,
     "a symbolic link stands where none is followed, or links go in a circle",
     "name the file that the link points to (readlink -f)"},
    {ENAMETOOLONG, ErrorCode::kUnreadable, "the name is too long for this file system",
     "choose a shorter target"},
    {EMFILE, ErrorCode::kUnreadable, "too many files are open in this process",
     "raise the limit (ulimit -n 65536) or use fewer workers"},
    {ENFILE, ErrorCode::kUnreadable, "too many files are open on this machine",
     "close other programs, or raise fs.file-max"},
    {ESTALE, ErrorCode::kUnreadable, "the file was replaced on the server (stale handle)",
     "wait until nobody writes there, then try again"},
    {EIO, ErrorCode::kUnreadable, "input/output error",
     "look for disk or network failures in the kernel log (dmesg) before trusting this disk"},
    {EFBIG, ErrorCode::kUnreadable, "the file would be larger than allowed",
     "raise the limit (ulimit -f), or choose a file system for large files"},
    {ENOSYS, ErrorCode::kUnsupported, "this file system has no such operation",
     "choose a target on another file system"},
    {ENOTSUP, ErrorCode::kUnsupported, "this file system does not support it",
     "choose a target on another file system"},
    {EXDEV, ErrorCode::kUnsupported, "the two names lie on different file systems",
     "choose a target on the same file system"},
};

void add_space(int error, const SystemFailure& failure, ErrorInfo* info) {
  if (failure.needed_bytes >= 0) {
    info->expected = "room for " + std::to_string(failure.needed_bytes) + " more bytes";
  }
  FreeSpace space;
  if (ask_free_space(failure.path, &space) != 0) {
    info->found += "; the file system does not say how much is free";
    return;
  }
  info->found += "; " + std::to_string(space.bytes) + " bytes free";
  if (error == EDQUOT) info->found += " on the file system; the quota allows fewer";
  if (space.inodes == 0) info->found += ", 0 inodes free: no further file can be made";
}

}  // namespace

void fail_system(int error, const SystemFailure& failure) {
  const auto* known = std::find_if(std::begin(kExplanations), std::end(kExplanations),
                                   [&](const Explanation& each) { return each.error == error; });
  const bool is_known = known != std::end(kExplanations);
  const char* description = is_known ? known->reason : strerrordesc_np(error);
  const std::string reason =
      description != nullptr ? description : "error " + std::to_string(error);
  ErrorInfo info{.code = is_known ? known->code : ErrorCode::kUnreadable,
                 .what = std::string(failure.operation) + " failed: " + reason + ".",
                 .file = failure.path,
                 .next = is_known ? known->next : "look into the kernel log (dmesg) for the cause"};
  if (failure.at_byte >= 0) info.entry = "byte " + std::to_string(failure.at_byte);
  const char* symbol = strerrorname_np(error);
  info.found = "errno " + std::to_string(error) + (symbol ? std::string(", ") + symbol : "");
  if (info.code == ErrorCode::kNoSpace && !mutant("free_space_unsaid"))
    add_space(error, failure, &info);
  throw Error(std::move(info));
}

const char* kernel_path(const std::string& path) {
  if (path.find('\0') != std::string::npos && !mutant("nul_path_cut")) {
    throw Error(ErrorInfo{.code = ErrorCode::kHostile,
                          .what = "A path contains a NUL character.",
                          .found = quote(path),
                          .next = "do not use the file that this name comes from"});
  }
  return path.c_str();
}

std::string parent_of(const std::string& path) {
  const size_t end = path.find_last_not_of('/');
  if (end == std::string::npos) return path.empty() ? "." : "/";
  const size_t slash = path.find_last_of('/', end);
  if (slash == std::string::npos) return ".";
  const size_t last = path.find_last_not_of('/', slash);
  return last == std::string::npos ? "/" : path.substr(0, last + 1);
}

int ask_free_space(std::string path, FreeSpace* space) {
  struct statvfs status {};
  while (retry_interrupted([&] { return ::statvfs(kernel_path(path), &status); }) != 0) {
    if ((errno != ENOENT && errno != ENOTDIR) || path == "." || path == "/") return errno;
    path = parent_of(path);
  }
  if (__builtin_mul_overflow(status.f_bavail, status.f_frsize, &space->bytes)) {
    space->bytes = std::numeric_limits<int64_t>::max();
  }
  const auto most = static_cast<fsfilcnt_t>(std::numeric_limits<int64_t>::max());
  space->inodes = status.f_files == 0 ? -1 : static_cast<int64_t>(std::min(status.f_favail, most));
  return 0;
}

}  // namespace isoshard::checkpoint
