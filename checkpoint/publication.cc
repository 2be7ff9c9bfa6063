// The order of steps is the whole point: contents durable, folders durable from the inside out,
// rename, parent durable, and only then the old folder goes.
#include "checkpoint/publication.h"

#include <algorithm>

#include "checkpoint/cancel.h"
#include "checkpoint/hidden_name.h"
#include "checkpoint/manifest.h"
#include "core/check.h"
#include "core/error.h"
#include "core/mutant.h"

namespace isoshard::checkpoint {
namespace {

// The same failure with what is safe now, which only the caller's place in the protocol tells.
[[noreturn]] void fail_again(const Error& error, const std::string& safe) {
  ErrorInfo info = error.info();
  info.safe = safe;
  throw Error(std::move(info));
}

// Mounts of object stores answer a rename of a folder with almost any error, so that what helps
// there is said beside what the error itself suggests.
[[noreturn]] void fail_rename(const Error& error) {
  ErrorInfo info = error.info();
  info.what = "The finished folder could not get its final name. " + info.what;
  info.next += std::string(info.next.empty() ? "" : "; ") +
               "if the target lies in a mount of an object store, choose a local disk or NFS";
  throw Error(std::move(info));
}

[[noreturn]] void fail_taken(const std::string& path, const std::string& what, bool by_file) {
  throw Error(ErrorInfo{.code = ErrorCode::kExists,
                        .what = what,
                        .file = path,
                        .found = by_file ? "a file" : "a folder",
                        .next = by_file ? "choose another target, or move the file away"
                                        : "choose another target, or give --overwrite"});
}

}  // namespace

StagedFolder::StagedFolder(Storage& storage, std::string final_path, bool overwrite,
                           std::unique_ptr<LeftoverFolder> leftover)
    : storage_(storage), overwrite_(overwrite) {
  const SplitPath parts = split_path(final_path);
  if (parts.name.empty() || parts.name == "." || parts.name == "..") {
    throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                          .what = "The target must end in the name of a folder.",
                          .file = final_path,
                          .next = "name the folder that is to be made"});
  }
  final_path_ = final_path.substr(0, final_path.find_last_not_of('/') + 1);
  parent_path_ = parts.parent;
  if (storage_.is_file(final_path_)) {
    fail_taken(final_path_, "A file stands where the folder is to be.", true);
  }
  const bool is_taken = storage_.is_directory(final_path_);
  if (!is_taken) refuse_other(parts.name);
  if (is_taken && !overwrite_ && !mutant("existing_target_taken")) {
    fail_taken(final_path_, "The target exists; it was not touched.", false);
  }
  const std::string staging_path = join_path(parent_path_, hidden_name(parts.name));
  try {
    make_parents();
    note_hidden_folder(staging_path);
    storage_.make_directory(staging_path);
    staging_path_ = staging_path;
    is_taken ? probe_exchange() : probe_rename();
    if (leftover != nullptr && !in_place_) take_up(std::move(leftover));
    if (lock_ == nullptr) lock_ = lock_new_folder(storage_, staging_path_);
  } catch (...) {
    remove_staging();
    throw;
  }
}

// A name that is taken by neither file nor folder: a link that leads nowhere, a device.
void StagedFolder::refuse_other(const std::string& name) const {
  if (!storage_.is_directory(parent_path_)) return;
  for (const DirectoryEntry& entry : storage_.list(parent_path_)) {
    if (entry.name != name) continue;
    throw Error(
        ErrorInfo{.code = ErrorCode::kExists,
                  .what = "Something that is neither file nor folder has the target's name.",
                  .file = final_path_,
                  .found = "a link that leads nowhere, or a device",
                  .next = "choose another target, or remove it"});
  }
}

StagedFolder::~StagedFolder() {
  if (!published_ && !kept_ && !mutant("staging_left_behind")) remove_staging();
}

void StagedFolder::keep() {
  CHECK(!in_place_, "a folder with its final name is not kept unfinished");
  kept_ = true;
  if (may_be_shown_) return;
  try {
    const std::string manifest = join_path(staging_path_, kManifestName);
    if (storage_.is_file(manifest)) storage_.remove_file(manifest);
  } catch (const Error&) {
    // It stays as it is, and is named to who looks for it.
  }
}

void StagedFolder::make_parents() {
  std::vector<std::string> missing;  // innermost first
  for (std::string path = parent_path_; path != "." && path != "/" && !storage_.is_directory(path);
       path = split_path(path).parent) {
    missing.push_back(path);
  }
  for (; !missing.empty(); missing.pop_back()) {
    try {
      storage_.make_directory(missing.back());
      made_parents_.push_back(missing.back());
    } catch (const Error& error) {
      // Another program made it in the meantime: then it is not ours to remove.
      if (error.info().code != ErrorCode::kExists) throw;
      storage_.make_directories(missing.back());
    }
  }
}

// Hours of work must not end in a file system that cannot publish them.
void StagedFolder::probe_exchange() {
  const std::string a = join_path(staging_path_, "a");
  const std::string b = join_path(staging_path_, "b");
  storage_.make_directory(a);
  storage_.make_directory(b);
  try {
    storage_.exchange(a, b);
  } catch (const Error& error) {
    ErrorInfo info = error.info();
    info.what = "The existing target cannot be replaced in one step. " + info.what;
    info.file = final_path_;
    info.safe = "the existing target is untouched";
    info.next = "choose a target that does not exist, or move this one away first";
    throw Error(std::move(info));
  }
  storage_.remove_tree(a);
  storage_.remove_tree(b);
}

// With something in it: some mounts (gcsfuse) rename empty folders only. Tried twice, so that one
// passing failure does not decide.
void StagedFolder::probe_rename() {
  const std::string a = join_path(staging_path_, "a"), b = join_path(staging_path_, "b");
  storage_.make_directories(join_path(a, "c"));
  storage_.create(join_path(join_path(a, "c"), "d"))->close();
  for (int tries = 0;; ++tries) {
    try {
      CHECK(storage_.rename_if_absent(a, b), "a new folder holds a name already");
      break;
    } catch (const Error& error) {
      const ErrorCode code = error.info().code;
      if (code == ErrorCode::kInterrupted || code == ErrorCode::kNoSpace) throw;
      if (tries > 0) return begin_in_place();
    }
  }
  storage_.remove_tree(b);
}

// Under a name of its own: who finds it by the old one finds nothing. A folder that is gone is no
// failure, as the work can begin anew.
void StagedFolder::take_up(std::unique_ptr<LeftoverFolder> leftover) {
  storage_.remove_tree(staging_path_);
  try {
    resumed_ = storage_.rename_if_absent(leftover->path, staging_path_);
    CHECK(resumed_, "a name that was free is taken: " + staging_path_);
    lock_ = std::move(leftover->lock);
  } catch (const Error& error) {
    if (error.info().code != ErrorCode::kNotFound) throw;
    storage_.make_directory(staging_path_);
  }
}

void StagedFolder::begin_in_place() {
  storage_.remove_tree(staging_path_);
  staging_path_.clear();  // nothing to remove until the final folder is ours
  note_hidden_folder("");
  storage_.make_directory(final_path_);
  const std::string mark = kStagingMark + nonce();
  storage_.create(join_path(final_path_, mark))->close();
  mark_ = mark;
  staging_path_ = final_path_;
  in_place_ = true;
  note_hidden_folder(final_path_);
  storage_.sync_directory(final_path_);  // no file may be there without the mark, whatever is lost
}

// The name is public: somebody may have put another folder there.
bool StagedFolder::is_still_ours() const { return storage_.is_file(join_path(final_path_, mark_)); }

void StagedFolder::end_in_place() {
  if (!is_still_ours() && !mutant("in_place_foreign_folder")) {
    staging_path_.clear();  // theirs
    throw Error(ErrorInfo{.code = ErrorCode::kExists,
                          .what = "Another program has put its own folder under the target's name.",
                          .file = final_path_,
                          .expected = "the mark " + quote(mark_),
                          .found = "none",
                          .next = "find out who writes there, then give the command again"});
  }
  storage_.remove_file(join_path(final_path_, mark_));
}

void StagedFolder::settle() {
  if (!in_place_) return;
  storage_.sync_everything(staging_path_);
  sync_folders();
}

void StagedFolder::sync_folders() {
  std::vector<std::string> folders = {staging_path_};  // every folder before those inside it
  for (size_t at = 0; at < folders.size(); ++at) {
    const std::string folder = folders[at];
    for (const DirectoryEntry& entry : storage_.list(folder)) {
      if (entry.kind == DirectoryEntry::Kind::kDirectory) {
        folders.push_back(join_path(folder, entry.name));
      }
    }
  }
  for (auto folder = folders.rbegin(); folder != folders.rend(); ++folder) {
    storage_.sync_directory(*folder);
  }
}

void StagedFolder::show(bool replaces) {
  if (in_place_) return end_in_place();
  bool is_free = true;
  try {
    if (replaces) {
      storage_.exchange(staging_path_, final_path_);
    } else {
      is_free = storage_.rename_if_absent(staging_path_, final_path_);
    }
  } catch (const Error& error) {
    fail_rename(error);
  }
  if (!is_free && !mutant("publish_taken_name_ignored")) {
    fail_taken(final_path_, "The target appeared while the new folder was written.", false);
  }
}

void StagedFolder::publish() {
  CHECK(!published_, "published twice: " + final_path_);
  throw_if_cancelled();
  const bool replaces = !in_place_ && overwrite_ && storage_.is_directory(final_path_);
  try {
    if (!mutant("publish_data_unsynced")) storage_.sync_everything(staging_path_);
    sync_folders();
    throw_if_cancelled();
    note_hidden_folder("");  // from here on the name may stand for the folder that is replaced
    may_be_shown_ = true;
    show(replaces);
  } catch (const Error& error) {
    fail_again(error, "nothing was published; what stood under the final name is untouched");
  }
  published_ = true;
  try {
    if (in_place_) storage_.sync_directory(final_path_);  // the mark does not come back
    if (!mutant("publish_name_unsynced")) storage_.sync_directory(parent_path_);
    for (auto made = made_parents_.rbegin(); made != made_parents_.rend(); ++made) {
      storage_.sync_directory(split_path(*made).parent);
    }
  } catch (const Error& error) {
    const std::string old = replaces ? "; the one it replaced is " + staging_path_ : "";
    fail_again(error,
               "the new folder is whole under its final name, but a power failure may undo "
               "that" +
                   old);
  }
  if (replaces && !mutant("replaced_folder_left")) replace_old();
}

// The new folder is published whatever happens here, so a failure is told and not thrown: the exit
// status must agree with what a reader finds.
void StagedFolder::replace_old() {
  CHECK(!in_place_, "nothing is replaced in place");
  const std::string trash = join_path(parent_path_, kTrashMark + nonce());
  left_behind_ = staging_path_;
  try {
    if (!storage_.rename_if_absent(staging_path_, trash)) return;
    left_behind_ = trash;
    note_hidden_folder(trash);
    storage_.remove_tree(trash);
    note_hidden_folder("");
    left_behind_.clear();
  } catch (const Error&) {
    // left_behind() names what is still there.
  }
}

// All but the mark, which must be the last to go, also after power loss. False when the folder is
// not ours any more.
bool StagedFolder::clear_in_place() {
  if (!is_still_ours()) return false;
  for (const DirectoryEntry& entry : storage_.list(final_path_)) {
    const std::string path = join_path(final_path_, entry.name);
    if (entry.name == mark_ && !mutant("mark_removed_first")) continue;
    entry.kind == DirectoryEntry::Kind::kDirectory ? storage_.remove_tree(path)
                                                   : storage_.remove_file(path);
  }
  storage_.sync_directory(final_path_);
  return true;
}

// Storage cannot remove "only if empty" in one step. A parent is therefore moved to a hidden name
// first, where no other program can still put anything, and moved back if it is not empty.
void StagedFolder::remove_staging() noexcept {
  try {
    note_hidden_folder(staging_path_);
    if (in_place_ && !staging_path_.empty() && !clear_in_place()) return;
    if (!staging_path_.empty()) storage_.remove_tree(staging_path_);
    note_hidden_folder("");
    for (; !made_parents_.empty(); made_parents_.pop_back()) {
      const std::string& made = made_parents_.back();
      if (!storage_.list(made).empty() || mutant("parents_not_removed")) return;
      if (!remove_if_it_holds(storage_, made, 0)) return;
    }
  } catch (...) {
    // The failure that brought us here is the one to report; leftovers() finds what remains.
  }
}

bool remove_if_it_holds(Storage& storage, const std::string& folder, size_t entries) {
  const std::string trash = join_path(split_path(folder).parent, kTrashMark + nonce());
  if (!storage.rename_if_absent(folder, trash)) return false;
  if (storage.list(trash).size() != entries) {
    storage.rename_if_absent(trash, folder);
    return false;
  }
  storage.remove_tree(trash);
  return true;
}

bool is_unfinished(Storage& storage, const std::string& folder) {
  const std::vector<DirectoryEntry> entries = storage.list(folder);
  return std::ranges::any_of(entries, [](const DirectoryEntry& entry) {
    return is_mark_and_nonce(entry.name, kStagingMark);
  });
}

std::vector<std::string> leftovers(Storage& storage, const std::string& parent) {
  std::vector<std::string> names;
  if (!storage.is_directory(parent)) return names;
  for (const DirectoryEntry& entry : storage.list(parent)) {
    const bool is_staging = entry.name.front() == '.' && (mutant("leftovers_of_others") ||
                                                          ends_in_nonce(entry.name, kStagingMark));
    const bool is_trash = is_mark_and_nonce(entry.name, kTrashMark);
    if (is_staging || is_trash) names.push_back(entry.name);
  }
  return names;
}

}  // namespace isoshard::checkpoint
