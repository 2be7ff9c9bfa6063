// For tests alone: the kernel refuses one system call of this process from now on, as a file system
// that lacks it would. Nothing undoes it, so it is for processes of their own (EXPECT_EXIT).
#pragma once

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <cstddef>

namespace isoshard::checkpoint {

// The calls that take a path and name one of a folder's entries, and others that tests let fail, by
// their number (SYS_renameat2). False where the kernel knows no such filter.
inline bool fail_call(long number, int error) {
  const auto wanted = static_cast<unsigned>(number);
  sock_filter rules[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, wanted, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (static_cast<unsigned>(error) & 0xFFFF)),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog program{.len = sizeof rules / sizeof rules[0], .filter = rules};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

}  // namespace isoshard::checkpoint
