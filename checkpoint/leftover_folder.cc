// See leftover_folder.h.
#include "checkpoint/leftover_folder.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "checkpoint/cancel.h"
#include "checkpoint/hidden_name.h"
#include "checkpoint/manifest.h"
#include "checkpoint/posix_storage.h"
#include "core/check.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

constexpr int kDeepest = 16;    // folders inside one another; a checkpoint has three
constexpr int kLockTries = 10;  // 200 ms: longer than who only asks holds a lock

struct Candidate {
  std::string path;
  OwnEntry own;  // sums, and the last change of all
  int64_t files = 0;
};

// Sizes of the regular files, links not followed. A folder that cannot be listed counts as empty.
void measure(Storage& storage, const std::string& folder, int depth, Candidate* sum) {
  if (depth > kDeepest) return;
  for (const DirectoryEntry& entry : storage.list(folder)) {
    const std::string path = join_path(folder, entry.name);
    const OwnEntry own = look_at(path);
    sum->own.changed_at = std::max(sum->own.changed_at, own.changed_at);
    if (own.kind == OwnEntry::Kind::kFolder) measure(storage, path, depth + 1, sum);
    if (own.kind != OwnEntry::Kind::kFile) continue;
    ++sum->files;
    sum->own.size_bytes += own.size_bytes;
    sum->own.stored_bytes += own.stored_bytes;
  }
}

// Those that hold something: a folder without a byte may have been made this moment, before its
// writer could lock it.
std::vector<Candidate> candidates(Storage& storage, const SplitPath& target) {
  std::vector<Candidate> result;
  for (const DirectoryEntry& entry : storage.list(target.parent)) {
    if (entry.kind != DirectoryEntry::Kind::kDirectory) continue;
    if (!is_hidden_name_of(target.name, entry.name)) continue;
    Candidate candidate{.path = join_path(target.parent, entry.name), .own = {}};
    const OwnEntry top = look_at(candidate.path);
    if (top.kind != OwnEntry::Kind::kFolder) continue;
    candidate.own.changed_at = top.changed_at;
    try {
      measure(storage, candidate.path, 0, &candidate);
    } catch (const Error& error) {
      if (error.info().code != ErrorCode::kNotFound) throw;
      continue;  // its writer has shown it, or it was removed
    }
    if (candidate.own.size_bytes > 0) result.push_back(std::move(candidate));
  }
  std::ranges::stable_sort(result, [](const Candidate& a, const Candidate& b) {
    return a.own.stored_bytes > b.own.stored_bytes;
  });
  return result;
}

int64_t seconds_since(int64_t moment) {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::seconds>(now).count() - moment;
}

// Of any kind.
bool has_manifest(Storage& storage, const std::string& folder) {
  return std::ranges::any_of(storage.list(folder), [](const DirectoryEntry& entry) {
    return entry.name == kManifestName;
  });
}

// Locks it, or says why not.
std::string why_not(Storage& storage, const Candidate& candidate, LockAnswer* answer) {
  *answer = lock_folder_patiently(storage, candidate.path, kLockTries);
  const std::string why =
      why_its_writer_may_live(*answer, candidate.path, seconds_since(candidate.own.changed_at));
  if (!why.empty()) return why;
  if (!has_manifest(storage, candidate.path)) return "";
  return "it holds a manifest: a whole folder that was to be shown, or one that was replaced; "
         "isoshard verify it, then move it to a name or delete it yourself";
}

}  // namespace

std::string why_its_writer_may_live(const LockAnswer& answer, const std::string& path,
                                    int64_t quiet_seconds) {
  switch (answer.state) {
    case LockAnswer::State::kTheirs:
      return "a program holds its lock and is at work there";
    case LockAnswer::State::kUnknown:
      return "this file system has no locks, which would tell whether its writer lives";
    case LockAnswer::State::kOurs:
      break;
  }
  if (!answer.shared) return "";
  if (!made_on_this_machine(path))
    return "this file system is shared with other machines, and another one, or this one before it "
           "was started anew, has made it: its writer may live";
  if (quiet_seconds >= kQuietSharedLeftoverSeconds) return "";
  return "this file system is shared, its locks may not be seen everywhere, and it changed " +
         std::to_string(quiet_seconds) + " s ago: its writer is taken for dead after " +
         std::to_string(kQuietSharedLeftoverSeconds) + " s";
}

LeftoverSearch find_leftover_folder(Storage& storage, const std::string& final_path) {
  LeftoverSearch search;
  const SplitPath target = split_path(final_path);
  if (dynamic_cast<PosixStorage*>(&storage) == nullptr || !storage.is_directory(target.parent))
    return search;
  const bool may_be_replaced = storage.is_file(join_path(final_path, kManifestName));
  for (const Candidate& candidate : candidates(storage, target)) {
    const auto pass = [&](const std::string& why) {
      search.passed_over.push_back(quote(candidate.path) + ": " + why);
    };
    if (may_be_replaced) {
      pass(
          "the target that stands there was written by isoshard, and this may be what it replaced");
      continue;
    }
    try {
      LockAnswer answer;
      if (const std::string why = why_not(storage, candidate, &answer); !why.empty()) {
        pass(why);
      } else if (search.found != nullptr) {
        pass("another one holds more");
      } else {
        search.found = std::make_unique<LeftoverFolder>(LeftoverFolder{
            candidate.path, candidate.own.stored_bytes, candidate.files, std::move(answer.lock)});
      }
    } catch (const Error& error) {
      if (error.info().code == ErrorCode::kInterrupted) throw;
      if (error.info().code != ErrorCode::kNotFound) pass(error.info().what);
    }
  }
  return search;
}

namespace {

// `inside` is the folder's path relative to the top, with a slash behind it, or empty.
int64_t clear(Storage& storage, const std::string& folder, const std::string& inside,
              const std::set<std::string>& files) {
  int64_t removed = 0;
  for (const DirectoryEntry& entry : storage.list(folder)) {
    throw_if_cancelled();
    const std::string path = join_path(folder, entry.name), name = inside + entry.name;
    const OwnEntry::Kind kind = look_at(path).kind;
    if (kind == OwnEntry::Kind::kFile && files.contains(name)) continue;
    const auto below = files.lower_bound(name + "/");
    if (kind == OwnEntry::Kind::kFolder && below != files.end() && below->starts_with(name + "/")) {
      removed += clear(storage, path, name + "/", files);
      continue;
    }
    storage.remove_tree(path);
    ++removed;
  }
  return removed;
}

}  // namespace

int64_t keep_only(Storage& storage, const std::string& folder, const std::set<std::string>& files) {
  CHECK(dynamic_cast<PosixStorage*>(&storage) != nullptr, "only a disk has leftovers to clear");
  return clear(storage, folder, "", files);
}

}  // namespace isoshard::checkpoint
