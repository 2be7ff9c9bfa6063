// Names and folders: one system call a function, and what stands in where a file system lacks it.
#include "checkpoint/posix_storage.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>

#include "checkpoint/posix_error.h"
#include "checkpoint/posix_file.h"
#include "core/error.h"
#include "core/mutant.h"

namespace isoshard::checkpoint {
namespace {

constexpr int kRemoveScans = 3;

// 0 when nothing is there: what a path through a file names does not exist either.
mode_t mode_of(const std::string& path) {
  struct stat status {};
  if (retry_interrupted([&] { return ::stat(kernel_path(path), &status); }) == 0) {
    return status.st_mode;
  }
  if (errno != ENOENT && errno != ENOTDIR) fail_system(errno, {"Looking at the path", path});
  return 0;
}

std::vector<std::string> names_in(Descriptor descriptor, const std::string& path) {
  DIR* stream = ::fdopendir(descriptor.number());
  if (stream == nullptr) fail_system(errno, {"Listing the folder", path});
  descriptor.release();
  std::vector<std::string> names;
  errno = 0;
  while (const dirent* entry = ::readdir(stream)) {
    const std::string name = entry->d_name;
    if (name != "." && name != "..") names.push_back(name);
    errno = 0;
  }
  const int error = errno;
  ::closedir(stream);
  if (error != 0) fail_system(error, {"Listing the folder", path});
  std::sort(names.begin(), names.end());
  if (mutant("list_unsorted")) std::reverse(names.begin(), names.end());
  return names;
}

DirectoryEntry describe(const std::string& name, const struct stat& status, bool is_link) {
  DirectoryEntry entry{.name = name, .kind = DirectoryEntry::Kind::kOther};
  if (S_ISREG(status.st_mode)) {
    entry.kind = DirectoryEntry::Kind::kFile;
    entry.size_bytes = status.st_size;
  } else if (S_ISDIR(status.st_mode) && (!is_link || mutant("folder_over_link"))) {
    entry.kind = DirectoryEntry::Kind::kDirectory;
  }
  return entry;
}

bool cannot_rename_so(int error) { return error == EINVAL || error == ENOSYS || error == ENOTSUP; }

bool reserve_and_rename(const std::string& from, const std::string& to) {
  struct stat status {};
  if (::lstat(from.c_str(), &status) != 0) fail_system(errno, {"Renaming", from});
  if (!S_ISDIR(status.st_mode)) {
    if (::link(from.c_str(), to.c_str()) != 0) {
      if (errno == EEXIST) return false;
      fail_system(errno, {"Renaming (by a second link)", to});
    }
    if (::unlink(from.c_str()) != 0) fail_system(errno, {"Removing the old name", from});
    return true;
  }
  if (::mkdir(to.c_str(), 0777) != 0) {
    if (errno == EEXIST) return false;
    fail_system(errno, {"Reserving the name", to});
  }
  if (::rename(from.c_str(), to.c_str()) == 0) return true;
  const int error = errno;
  ::rmdir(to.c_str());  // Refused when somebody has put something inside: then it is theirs.
  if (error == ENOTEMPTY || error == EEXIST) return false;
  fail_system(error, {"Renaming", to});
}

// One folder on the way down in remove_tree.
struct RemoveLevel {
  Descriptor descriptor;
  std::string name;
  std::vector<std::string> folders;  // not yet removed
  int scans = 0;
};

// Removes everything in the folder but its folders, which it notes.
void sweep(RemoveLevel& level, const std::string& path) {
  ++level.scans;
  const int folder = level.descriptor.number();
  Descriptor copy(::openat(folder, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (copy.number() < 0) fail_system(errno, {"Removing the folder", path});
  for (const std::string& name : names_in(std::move(copy), path)) {
    struct stat status {};
    const bool is_there = ::fstatat(folder, name.c_str(), &status,
                                    mutant("remove_follows_links") ? 0 : AT_SYMLINK_NOFOLLOW) == 0;
    if (is_there && S_ISDIR(status.st_mode)) {
      level.folders.push_back(name);
      continue;
    }
    if (::unlinkat(folder, name.c_str(), 0) == 0 || errno == ENOENT) continue;
    if (errno == EACCES && ::fchmod(folder, 0700) == 0 &&
        ::unlinkat(folder, name.c_str(), 0) == 0) {
      continue;
    }
    fail_system(errno, {"Removing a file of the folder", path});
  }
}

Descriptor open_to_remove(int parent, const std::string& name, const std::string& path) {
  const int flags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
  int number = ::openat(parent, name.c_str(), flags);
  if (number < 0 && errno == EACCES && ::fchmodat(parent, name.c_str(), 0700, 0) == 0) {
    number = ::openat(parent, name.c_str(), flags);
  }
  if (number < 0) fail_system(errno, {"Removing the folder", path});
  return Descriptor(number);
}

bool remove_empty(int parent, const RemoveLevel& above, const std::string& name) {
  if (::unlinkat(parent, name.c_str(), AT_REMOVEDIR) == 0) return true;
  if (errno != EACCES || above.descriptor.number() < 0) return false;
  return ::fchmod(above.descriptor.number(), 0700) == 0 &&
         ::unlinkat(parent, name.c_str(), AT_REMOVEDIR) == 0;
}

}  // namespace

std::unique_ptr<ReadableFile> PosixStorage::open_read(const std::string& path) {
  return open_posix_read(path);
}

std::unique_ptr<WritableFile> PosixStorage::create(const std::string& path) {
  return create_posix(path);
}

std::unique_ptr<WritableFile> PosixStorage::open_write(const std::string& path) {
  return open_posix_write(path);
}

std::vector<DirectoryEntry> PosixStorage::list(const std::string& directory) {
  const OpenedPath opened = open_path(directory, O_RDONLY | O_DIRECTORY, "Listing the folder");
  const int folder = opened.descriptor.number();
  Descriptor copy(::fcntl(folder, F_DUPFD_CLOEXEC, 0));
  if (copy.number() < 0) fail_system(errno, {"Listing the folder", directory});
  std::vector<DirectoryEntry> entries;
  for (const std::string& name : names_in(std::move(copy), directory)) {
    struct stat status {};
    if (::fstatat(folder, name.c_str(), &status, AT_SYMLINK_NOFOLLOW) != 0) {
      if (errno == ENOENT) continue;  // removed since
      fail_system(errno, {"Looking at a file of the folder", directory});
    }
    const bool is_link = S_ISLNK(status.st_mode);
    // A link that leads nowhere keeps its own status and is kOther.
    if (is_link) static_cast<void>(::fstatat(folder, name.c_str(), &status, 0));
    entries.push_back(describe(name, status, is_link));
  }
  return entries;
}

bool PosixStorage::is_file(const std::string& path) { return S_ISREG(mode_of(path)); }

bool PosixStorage::is_directory(const std::string& path) { return S_ISDIR(mode_of(path)); }

void PosixStorage::make_directories(const std::string& path) {
  std::vector<std::string> missing;
  std::string prefix = path;
  mode_t mode = mode_of(prefix);
  while (mode == 0 && prefix != "." && prefix != "/") {
    missing.push_back(prefix);
    prefix = parent_of(prefix);
    mode = mode_of(prefix);
  }
  if (!S_ISDIR(mode)) {
    fail_system(mode == 0 ? ENOENT : ENOTDIR,
                {"Making the folder", missing.empty() ? path : prefix});
  }
  for (; !missing.empty(); missing.pop_back()) {
    const std::string& folder = missing.back();
    if (::mkdir(folder.c_str(), 0777) == 0) continue;
    const int error = errno;
    // Another program may have made it in the meantime; a dangling link also says EEXIST.
    if (error != EEXIST || !is_directory(folder)) fail_system(error, {"Making the folder", folder});
  }
}

void PosixStorage::make_directory(const std::string& path) {
  if (::mkdir(kernel_path(path), 0777) != 0) fail_system(errno, {"Making the folder", path});
}

bool PosixStorage::rename_if_absent(const std::string& from, const std::string& to) {
  if (::renameat2(AT_FDCWD, kernel_path(from), AT_FDCWD, kernel_path(to),
                  mutant("rename_replaces") ? 0 : RENAME_NOREPLACE) == 0) {
    return true;
  }
  if (errno == EEXIST) return false;
  if (cannot_rename_so(errno)) return reserve_and_rename(from, to);
  fail_system(errno, {"Renaming", errno == ENOENT ? from : to});
}

void PosixStorage::rename_over(const std::string& from, const std::string& to) {
  if (::rename(kernel_path(from), kernel_path(to)) != 0) {
    fail_system(errno, {"Renaming", errno == ENOENT ? from : to});
  }
}

void PosixStorage::exchange(const std::string& a, const std::string& b) {
  if (::renameat2(AT_FDCWD, kernel_path(a), AT_FDCWD, kernel_path(b),
                  mutant("exchange_by_rename") ? 0 : RENAME_EXCHANGE) == 0)
    return;
  if (!cannot_rename_so(errno)) fail_system(errno, {"Exchanging two names", b});
  throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                        .what = "This file system cannot exchange two names in one step.",
                        .file = b,
                        .next = "write to a new name, or move the old one away first"});
}

void PosixStorage::remove_file(const std::string& path) {
  if (::unlink(kernel_path(path)) != 0) fail_system(errno, {"Removing the file", path});
}

void PosixStorage::remove_tree(const std::string& path) {
  struct stat status {};
  if (::lstat(kernel_path(path), &status) != 0) fail_system(errno, {"Removing the folder", path});
  if (!S_ISDIR(status.st_mode)) return remove_file(path);
  std::vector<RemoveLevel> levels(1);  // levels[0] stands for the place above, with no descriptor
  levels[0].folders = {path};
  const auto number = [](const RemoveLevel& level) {
    return level.descriptor.number() < 0 ? AT_FDCWD : level.descriptor.number();
  };
  while (levels.size() > 1 || !levels[0].folders.empty()) {
    RemoveLevel& top = levels.back();
    if (!top.folders.empty()) {
      RemoveLevel next{.descriptor = Descriptor(), .name = top.folders.back(), .folders = {}};
      top.folders.pop_back();
      next.descriptor = open_to_remove(number(top), next.name, path);
      sweep(next, path);
      levels.push_back(std::move(next));
      continue;
    }
    const RemoveLevel& above = levels[levels.size() - 2];
    if (remove_empty(number(above), above, top.name)) {
      levels.pop_back();
    } else if (errno == ENOTEMPTY && top.scans < kRemoveScans) {
      sweep(top, path);  // somebody has added a file since
    } else {
      fail_system(errno, {"Removing the folder", path});
    }
  }
}

void PosixStorage::sync_directory(const std::string& path) {
  const OpenedPath opened = open_path(path, O_RDONLY | O_DIRECTORY, "Opening the folder");
  if (::fsync(opened.descriptor.number()) == 0) return;
  if (errno == EINVAL || errno == ENOTSUP) return;
  fail_system(errno, {"Making the folder durable (fsync)", path});
}

void PosixStorage::sync_everything(const std::string& path) {
  const OpenedPath opened = open_path(path, O_RDONLY | O_NONBLOCK, "Opening the path");
  if (::syncfs(opened.descriptor.number()) != 0) {
    fail_system(errno, {"Making the file system durable (syncfs)", path});
  }
}

void PosixStorage::drop_cache(const std::string& path) {
  const OpenedPath opened = open_path(path, O_RDONLY | O_NONBLOCK, "Opening the path");
  if (::fsync(opened.descriptor.number()) != 0)
    fail_system(errno, {"Making the file durable", path});
  // Advice only: where the kernel declines, the read comes from memory and is no less correct.
  (void)::posix_fadvise(opened.descriptor.number(), 0, 0, POSIX_FADV_DONTNEED);
}

FreeSpace PosixStorage::free_space(const std::string& path) {
  FreeSpace space;
  const int error = ask_free_space(path, &space);
  if (error != 0) fail_system(error, {"Asking for the free space", path});
  return space;
}

std::string PosixStorage::canonical(const std::string& path) {
  std::string prefix = path.empty() ? "." : path;
  std::vector<std::string> rest;  // innermost first
  char* resolved = ::realpath(kernel_path(prefix), nullptr);
  while (resolved == nullptr) {
    if ((errno != ENOENT && errno != ENOTDIR) || prefix == "." || prefix == "/") {
      fail_system(errno, {"Resolving the path", path});
    }
    const size_t end = prefix.find_last_not_of('/');
    const size_t slash = prefix.find_last_of('/', end);
    rest.push_back(prefix.substr(slash + 1, end - slash));
    prefix = parent_of(prefix);
    resolved = ::realpath(prefix.c_str(), nullptr);
  }
  std::string result = resolved;
  std::free(resolved);
  for (auto component = rest.rbegin(); component != rest.rend(); ++component) {
    if (*component == ".") continue;
    if (*component == "..") {
      result = parent_of(result);
    } else {
      result += (result == "/" ? "" : "/") + *component;
    }
  }
  return result;
}

}  // namespace isoshard::checkpoint
