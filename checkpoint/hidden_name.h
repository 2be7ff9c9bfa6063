// The names under which unfinished things lie: `.<name>.isoshard-<nonce>` beside the final name,
// `.isoshard-<nonce>` inside a folder that is written in place, `.trash-<nonce>`.
//
//   .global_step3.isoshard-0123456789abcdeffedcba9876543210
//    |            |         |               |
//    final name   mark      random          the running system that wrote it
#pragma once

#include <string>

namespace isoshard::checkpoint {

inline constexpr const char* kStagingMark = ".isoshard-";
inline constexpr const char* kTrashMark = ".trash-";

struct SplitPath {
  std::string parent;  // "." or "/" when there is nothing before the name
  std::string name;    // without slashes behind it; empty for "/"
};
SplitPath split_path(const std::string& path);
std::string join_path(const std::string& folder, const std::string& name);

// 32 hexadecimal digits that no other process, thread or earlier call has.
std::string nonce();

// ".<name>.isoshard-<nonce>", the name without DeepSpeed's patterns and short enough.
std::string hidden_name(const std::string& name);

// Whether hidden_name(name), of this run or another, can have given `hidden`.
bool is_hidden_name_of(const std::string& name, const std::string& hidden);

// Whether the name ends in, or is, a mark and a nonce.
bool ends_in_nonce(const std::string& name, const std::string& mark);
bool is_mark_and_nonce(const std::string& name, const std::string& mark);

// Whether the nonce at the end was made on this machine since it was started: a lock that is seen
// by this machine alone tells of such a writer whether it lives.
bool made_on_this_machine(const std::string& name);

}  // namespace isoshard::checkpoint
