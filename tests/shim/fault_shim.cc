// LD_PRELOAD library for tests/shim.py: answers of a kernel that a disk seldom gives, at the n-th
// call. It asks the kernel by itself, so that nothing else of the C library is replaced.
//
//   ISOSHARD_FAULT        the faults, as fault_plan.h says
//   ISOSHARD_FAULT_UNDER  only files whose path begins so; closing counts where a file was written
//   ISOSHARD_FAULT_LOG    file that gets `struck CALL N`, `told CALL N` of a late error, and at the
//                         end `count CALL N`
//
// Not here: calls by the threads of other programs, and system calls that strace injects as well.
#include <dlfcn.h>
#include <fcntl.h>
#include <link.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "tests/shim/fault_plan.h"

extern "C" void* __libc_malloc(size_t size_bytes);

namespace {

using namespace isoshard::shim;
using Text = std::string_view;

// The library has no main and no caller to hand this through: the one thing kept between calls.
// Zeros until begin(), which is when malloc is called already.
struct State {
  FaultPlan faults;
  std::array<std::atomic<int64_t>, kCalls> counts;
  const char* under = nullptr;
  const char* log = nullptr;
  int (*main)(int, char**, char**) = nullptr;
  uintptr_t libcrypto_begin = 0, libcrypto_end = 0;
  bool begun = false;  // calls count from the first of main() on
  std::atomic<int> late_error{0};
  std::atomic<int> late_file{-1};
  Call late_call = kCalls;
};
constinit State state;

void log_line(const char* word, Call call, int64_t number) {
  if (state.log == nullptr) return;
  char line[64];
  const int length = std::snprintf(line, sizeof line, "%s %s %lld\n", word, kCallNames[call],
                                   static_cast<long long>(number));
  const long file =
      ::syscall(SYS_openat, AT_FDCWD, state.log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
  ::syscall(SYS_write, file, line, length);
  ::syscall(SYS_close, file);
}

__attribute__((constructor)) void begin() {
  state.under = std::getenv("ISOSHARD_FAULT_UNDER");
  state.log = std::getenv("ISOSHARD_FAULT_LOG");
  const char* given = std::getenv("ISOSHARD_FAULT");
  state.faults = parse_faults(given == nullptr ? "" : given);
}

__attribute__((destructor)) void end() {
  for (int call = 0; call < kCalls; ++call)
    log_line("count", static_cast<Call>(call), state.counts[static_cast<size_t>(call)]);
}

bool is_under(Text path) { return state.under == nullptr || path.starts_with(state.under); }

bool is_under(int file) {
  char link[32], path[4096];
  std::snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  const int64_t length = ::syscall(SYS_readlink, link, path, sizeof path);
  return length >= 0 && is_under(Text(path, static_cast<size_t>(length)));
}

const Fault* met(Call call, int64_t* number) {
  if (!state.begun) return nullptr;
  *number = ++state.counts[call];
  for (const Fault& fault : state.faults) {
    if (fault.call != call || *number < fault.first || *number > fault.last) continue;
    log_line("struck", call, *number);
    return &fault;
  }
  return nullptr;
}

int fail(int error) {
  errno = error;
  return -1;
}

size_t part_of(const Fault& fault, size_t size_bytes) {
  if (fault.deed == Deed::kHalf) return std::max<size_t>(1, size_bytes / 2);
  return fault.deed == Deed::kOne ? std::min<size_t>(1, size_bytes) : size_bytes;
}

// What a call answers that says only "done" or an error.
int answer(Call call, int file, int64_t done) {
  int64_t number = 0;
  const Fault* fault = met(call, &number);
  const bool is_late = state.late_error != 0 && state.late_call == call &&
                       (call != kClose || state.late_file == file);
  if (is_late) {
    log_line("told", call, number);
    return fail(state.late_error.exchange(0));
  }
  if (fault == nullptr) return static_cast<int>(done);
  if (fault->told_by == kCalls) return fail(fault->error);
  state.late_call = fault->told_by;
  state.late_file = file;
  state.late_error = fault->error;
  return static_cast<int>(done);
}

int64_t faulty_read(int file, void* data, size_t size_bytes, int64_t offset) {
  int64_t number = 0;
  const Fault* fault = is_under(file) ? met(kPread, &number) : nullptr;
  if (fault == nullptr) return ::syscall(SYS_pread64, file, data, size_bytes, offset);
  if (fault->deed == Deed::kError) return fail(fault->error);
  if (fault->deed == Deed::kNone) return 0;
  const int64_t count = ::syscall(SYS_pread64, file, data, part_of(*fault, size_bytes), offset);
  if (fault->deed == Deed::kFlip && count > 0) {
    const int64_t at = number * 7919 % count;
    static_cast<unsigned char*>(data)[at] ^= static_cast<unsigned char>(1 << number % 8);
  }
  return count;
}

int64_t faulty_write(int file, const void* data, size_t size_bytes, int64_t offset) {
  int64_t number = 0;
  const Fault* fault = is_under(file) ? met(kPwrite, &number) : nullptr;
  if (fault == nullptr) return ::syscall(SYS_pwrite64, file, data, size_bytes, offset);
  if (fault->deed == Deed::kError) return fail(fault->error);
  if (fault->deed == Deed::kNone) return 0;
  if (fault->deed == Deed::kLost) return static_cast<int64_t>(size_bytes);
  if (fault->deed == Deed::kAside) offset += 512;
  const int64_t count = ::syscall(SYS_pwrite64, file, data, part_of(*fault, size_bytes), offset);
  if (fault->deed == Deed::kFlip && count > 0) {
    const int64_t at = number * 7919 % count;
    const auto byte =
        static_cast<unsigned char>(static_cast<const unsigned char*>(data)[at] ^ (1 << number % 8));
    ::syscall(SYS_pwrite64, file, &byte, 1, offset + at);
  }
  return count;
}

// Version 3.0 crashes where memory ends in its own beginnings, so that what it asks for is no case.
// Where it lies is looked up once: asked at every allocation, the dynamic linker takes 30 times as
// long as the program.
void find_libcrypto() {
  const auto visit = [](dl_phdr_info* library, size_t, void*) {
    if (library->dlpi_name == nullptr || Text(library->dlpi_name).find("libcrypto") == Text::npos)
      return 0;
    for (int i = 0; i < library->dlpi_phnum; ++i) {
      const ElfW(Phdr)& part = library->dlpi_phdr[i];
      if (part.p_type != PT_LOAD) continue;
      const uintptr_t begin = library->dlpi_addr + part.p_vaddr;
      state.libcrypto_begin = std::min(state.libcrypto_begin, begin);
      state.libcrypto_end = std::max(state.libcrypto_end, begin + part.p_memsz);
    }
    return 1;
  };
  state.libcrypto_begin = UINTPTR_MAX;
  ::dl_iterate_phdr(visit, nullptr);
}

bool is_libcrypto(const void* caller) {
  const auto place = reinterpret_cast<uintptr_t>(caller);
  return place >= state.libcrypto_begin && place < state.libcrypto_end;
}

int begin_main(int count, char** arguments, char** environment) {
  find_libcrypto();
  state.begun = true;
  return state.main(count, arguments, environment);
}

int faulty_open(const char* path, int flags, mode_t mode) {
  int64_t number = 0;
  const Fault* fault = is_under(Text(path)) ? met(kOpen, &number) : nullptr;
  if (fault != nullptr) return fail(fault->error);
  return static_cast<int>(::syscall(SYS_openat, AT_FDCWD, path, flags, mode));
}

}  // namespace

extern "C" {

using Main = int (*)(int, char**, char**);

int __libc_start_main(Main main, int count, char** arguments, void (*init)(), void (*fini)(),
                      void (*rtld_fini)(), void* stack_end) {
  state.main = main;
  const auto real =
      reinterpret_cast<decltype(&__libc_start_main)>(::dlsym(RTLD_NEXT, "__libc_start_main"));
  return real(begin_main, count, arguments, init, fini, rtld_fini, stack_end);
}

ssize_t pread(int file, void* data, size_t size_bytes, off_t offset) {
  return faulty_read(file, data, size_bytes, offset);
}
ssize_t pread64(int file, void* data, size_t size_bytes, off64_t offset) {
  return faulty_read(file, data, size_bytes, offset);
}
ssize_t pwrite(int file, const void* data, size_t size_bytes, off_t offset) {
  return faulty_write(file, data, size_bytes, offset);
}
ssize_t pwrite64(int file, const void* data, size_t size_bytes, off64_t offset) {
  return faulty_write(file, data, size_bytes, offset);
}

int open(const char* path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  const mode_t mode = (flags & O_CREAT) != 0 ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  return faulty_open(path, flags, mode);
}

int fsync(int file) {
  const int64_t done = ::syscall(SYS_fsync, file);
  return is_under(file) ? answer(kFsync, file, done) : static_cast<int>(done);
}

int syncfs(int file) noexcept {
  const int64_t done = ::syscall(SYS_syncfs, file);
  return is_under(file) ? answer(kSyncfs, file, done) : static_cast<int>(done);
}

// The file is closed whatever is answered, as Linux does it.
int close(int file) {
  const int64_t flags = ::syscall(SYS_fcntl, file, F_GETFL);
  const bool counts = flags >= 0 && (flags & O_ACCMODE) != O_RDONLY && is_under(file);
  const int64_t done = ::syscall(SYS_close, file);
  return counts ? answer(kClose, file, done) : static_cast<int>(done);
}

void* malloc(size_t size_bytes) noexcept {
  int64_t number = 0;
  if (!state.begun || is_libcrypto(__builtin_return_address(0))) return __libc_malloc(size_bytes);
  if (met(kMalloc, &number) == nullptr) return __libc_malloc(size_bytes);
  errno = ENOMEM;
  return nullptr;
}
}
