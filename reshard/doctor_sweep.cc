// See doctor_sweep.h. Times and processes are the operating system's business, so this file asks it
// directly; every removal goes through Storage.
#include "reshard/doctor_sweep.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <set>

#include "checkpoint/deepspeed/reader.h"
#include "checkpoint/deepspeed/source.h"
#include "checkpoint/folder_lock.h"
#include "checkpoint/manifest.h"
#include "checkpoint/publication.h"
#include "core/error.h"

namespace isoshard::reshard {
namespace {

namespace fs = std::filesystem;
using checkpoint::join;

constexpr size_t kMarkBytes = 10 + 32;  // ".isoshard-" and the nonce

// "name" of ".name.isoshard-<nonce>".
std::string inner_name(const std::string& hidden) {
  return hidden.substr(1, hidden.size() - 1 - kMarkBytes);
}

bool is_inside(const std::string& path, const std::string& folder) {
  return path == folder || path.starts_with(folder + "/");
}

// Counts what lies there and when it last changed; what cannot be asked counts as changed now.
void measure(Leftover* leftover) {
  bool known = true;
  fs::file_time_type newest = fs::file_time_type::min();
  const auto add = [&](const fs::directory_entry& entry) {
    std::error_code error;
    if (entry.is_symlink(error)) return;
    newest = std::max(newest, entry.last_write_time(error));
    known = known && !error;
    if (!entry.is_regular_file(error)) return;
    ++leftover->files;
    leftover->size_bytes += static_cast<int64_t>(entry.file_size(error));
  };
  leftover->files = leftover->size_bytes = 0;
  std::error_code error;
  add(fs::directory_entry(leftover->path, error));
  if (fs::is_directory(leftover->path, error)) {
    for (auto it = fs::recursive_directory_iterator(leftover->path, error);
         !error && it != fs::recursive_directory_iterator(); it.increment(error))
      add(*it);
  }
  known = known && !error;
  const auto quiet = fs::file_time_type::clock::now() - newest;
  leftover->quiet_seconds =
      known ? std::chrono::duration_cast<std::chrono::seconds>(quiet).count() : 0;
}

struct Process {
  std::string number;
  fs::path folder;  // /proc/<number>
};

std::vector<Process> processes() {
  std::vector<Process> result;
  std::error_code error;
  for (auto it = fs::directory_iterator("/proc", error); !error && it != fs::directory_iterator();
       it.increment(error)) {
    const std::string name = it->path().filename().string();
    const bool number = name.find_first_not_of("0123456789") == std::string::npos;
    if (number && name != std::to_string(::getpid())) result.push_back({name, it->path()});
  }
  return result;
}

bool has_open(const Process& process, const std::string& path) {
  std::error_code error;
  if (is_inside(fs::read_symlink(process.folder / "cwd", error).string(), path)) return true;
  for (auto it = fs::directory_iterator(process.folder / "fd", error);
       !error && it != fs::directory_iterator(); it.increment(error)) {
    std::error_code gone;
    if (is_inside(fs::read_symlink(it->path(), gone).string(), path)) return true;
  }
  return false;
}

// Also one whose file was replaced or removed since it was started.
bool is_isoshard(const Process& process) {
  std::error_code error;
  const std::string program = fs::read_symlink(process.folder / "exe", error).filename().string();
  return program == "isoshard" || program == "isoshard (deleted)";
}

// A program of isoshard that was given the leftover's folder, or something in it, as an argument.
bool works_there(const Process& process, const std::string& parent) {
  std::error_code error;
  if (!is_isoshard(process)) return false;
  const fs::path here = fs::read_symlink(process.folder / "cwd", error);
  std::ifstream file(process.folder / "cmdline", std::ios::binary);
  for (std::string argument; std::getline(file, argument, '\0');) {
    const std::string value = argument.substr(argument.find('=') + 1);  // --option=value, or all
    const std::string path = fs::weakly_canonical(here / value, error).string();
    if (!error && (is_inside(path, parent) || is_inside(parent, path)) && path != "/") return true;
  }
  return false;
}

std::string holder_of(const std::string& path, const std::string& parent) {
  for (const Process& process : processes()) {
    if (has_open(process, path)) return "process " + process.number + " has it open";
    if (works_there(process, parent))
      return "process " + process.number + ", a program of isoshard, works in this folder";
  }
  return "";
}

// Letters that a hidden name changes are taken as equal, and a long name is cut there.
bool could_become(const std::string& inner, std::string name) {
  constexpr size_t kCut = 200;
  std::string cut = inner;
  std::ranges::replace(cut, '_', '-');
  std::ranges::replace(name, '_', '-');
  return name == cut || (cut.size() >= kCut && name.starts_with(cut));
}

// Why it may be something that somebody misses; empty when it is not.
std::string why_dear(Storage& storage, const Leftover& leftover) {
  const std::string parent = checkpoint::parent_folder(leftover.path);
  if (leftover.kind == Leftover::Kind::kUnfinished) {
    return storage.list(leftover.path).size() == 1
               ? ""
               : "it has a final name, under which other programs may have put files: look at it, "
                 "and delete it yourself";
  }
  if (leftover.kind != Leftover::Kind::kStaging) return "";
  if (storage.is_file(join(leftover.path, checkpoint::kManifestName)))
    return "it holds a manifest: a whole folder that was to be shown, or one that was replaced; "
           "isoshard verify it, then move it to a name or delete it yourself";
  const std::string inner = inner_name(checkpoint::base_name(leftover.path));
  for (const DirectoryEntry& entry : storage.list(parent)) {
    const std::string other = join(parent, entry.name);
    if (!could_become(inner, entry.name) || !storage.is_directory(other) ||
        !storage.is_file(join(other, checkpoint::kManifestName)))
      continue;
    return quote(entry.name) +
           " is published: this may be the folder of another program that it "
           "replaced; look at it, and delete it yourself";
  }
  return "";
}

// Where its lock is held by another, or cannot be asked for, that is why it must stay. Null also
// where there are no locks. What is gone by now has no lock; its removal says so.
std::unique_ptr<checkpoint::FolderLock> lock(Storage& storage, Leftover* leftover) {
  if (leftover->kind == Leftover::Kind::kTemporary) return nullptr;  // a file
  try {
    checkpoint::LockAnswer answer = checkpoint::lock_folder(storage, leftover->path);
    if (answer.state == checkpoint::LockAnswer::State::kTheirs)
      leftover->kept = "a process holds its lock: a command of isoshard is at work there";
    return std::move(answer.lock);
  } catch (const Error& error) {
    if (error.info().code == ErrorCode::kInterrupted) throw;
    leftover->kept = error.info().code == ErrorCode::kNotFound
                         ? "it is gone: it was shown or removed meanwhile"
                         : "its lock cannot be asked for: " + error.info().what;
    return nullptr;
  }
}

void judge(Storage& storage, Leftover* leftover) {
  if (fs::is_symlink(leftover->path)) {
    leftover->kept = "a link, which isoshard does not leave behind: look at it yourself";
    return;
  }
  measure(leftover);
  const std::string path = storage.canonical(leftover->path);
  const bool shared = checkpoint::is_shared_file_system(leftover->path);
  const int64_t limit = shared ? kQuietSharedSeconds : kQuietSeconds;
  static_cast<void>(lock(storage, leftover));
  if (leftover->kept.empty()) leftover->kept = holder_of(path, checkpoint::parent_folder(path));
  if (leftover->kept.empty() && leftover->quiet_seconds < limit) {
    leftover->kept = "changed " + std::to_string(leftover->quiet_seconds) +
                     " s ago: a program may be at work" +
                     (shared ? " on another machine (taken for dead after "
                             : " (taken for dead "
                               "after ") +
                     std::to_string(limit) + " s)";
  }
  if (leftover->kept.empty()) leftover->kept = why_dear(storage, *leftover);
}

std::optional<checkpoint::SourcePlace> place_of(Storage& storage, const std::string& source,
                                                const std::string& tag) {
  try {
    return checkpoint::resolve_source(storage, source, tag);
  } catch (const Error& error) {
    if (error.info().code == ErrorCode::kInterrupted) throw;
    return std::nullopt;  // a folder without a checkpoint may hold leftovers all the same
  }
}

std::string what_is(Leftover::Kind kind, const std::string& name) {
  const bool named = kind == Leftover::Kind::kStaging || kind == Leftover::Kind::kTemporary;
  const std::string inner = named ? inner_name(name) : "";
  switch (kind) {
    case Leftover::Kind::kStaging:
      return "what a command was writing, to become " + quote(inner);
    case Leftover::Kind::kTemporary:
      return "the new text of " + quote(inner) + ", not yet in its place";
    case Leftover::Kind::kTrash:
      return "a folder that was replaced, on its way to be removed";
    case Leftover::Kind::kUnfinished:
      break;
  }
  return "a folder written under its final name by a command that did not end";
}

// A folder that may not be listed cannot be told from one of somebody else.
bool is_marked(Storage& storage, const std::string& folder) {
  try {
    return checkpoint::is_unfinished(storage, folder);
  } catch (const Error& error) {
    const ErrorCode code = error.info().code;
    if (code == ErrorCode::kPermission || code == ErrorCode::kNotFound) return false;
    throw;
  }
}

}  // namespace

const char* name(Leftover::Kind kind) {
  switch (kind) {
    case Leftover::Kind::kStaging:
      return "staging folder";
    case Leftover::Kind::kTemporary:
      return "pointer temporary";
    case Leftover::Kind::kTrash:
      return "trash";
    case Leftover::Kind::kUnfinished:
      break;
  }
  return "unfinished folder";
}

std::vector<Leftover> find_leftovers(Storage& storage, const std::string& source,
                                     const std::string& tag) {
  checkpoint::require_source(storage, source, tag);
  std::set<std::string> folders, marked;
  if (storage.is_directory(source)) {
    folders.insert(source);
    for (const DirectoryEntry& entry : storage.list(source)) {
      const bool folder = entry.kind == DirectoryEntry::Kind::kDirectory;
      if (folder && entry.name.front() != '.') marked.insert(join(source, entry.name));
    }
  }
  if (const auto place = place_of(storage, source, tag)) {
    folders.insert(checkpoint::parent_folder(place->folder));
    marked.insert(place->folder);
  }
  std::set<std::string> seen;
  std::vector<Leftover> result;
  const auto add = [&](Leftover::Kind kind, const std::string& path) {
    if (!seen.insert(storage.canonical(path)).second) return;
    Leftover leftover{.kind = kind, .path = path};
    leftover.what = what_is(kind, checkpoint::base_name(path));
    judge(storage, &leftover);
    result.push_back(std::move(leftover));
  };
  for (const std::string& folder : folders) {
    for (const std::string& entry : checkpoint::leftovers(storage, folder)) {
      const std::string path = join(folder, entry);
      const bool trash = entry.starts_with(".trash-");
      // A bare mark is no file's temporary: it speaks of the folder that holds it.
      if (!trash && entry.size() == kMarkBytes) {
        marked.insert(folder);
        continue;
      }
      add(trash                        ? Leftover::Kind::kTrash
          : storage.is_directory(path) ? Leftover::Kind::kStaging
                                       : Leftover::Kind::kTemporary,
          path);
    }
  }
  for (const std::string& folder : marked) {
    if (is_marked(storage, folder)) add(Leftover::Kind::kUnfinished, folder);
  }
  std::ranges::sort(result, {}, &Leftover::path);
  return result;
}

void remove_leftover(Storage& storage, Leftover* leftover) {
  if (leftover->kept.empty()) judge(storage, leftover);
  if (!leftover->kept.empty()) return;
  const std::unique_ptr<checkpoint::FolderLock> held = lock(storage, leftover);
  if (!leftover->kept.empty()) return;  // taken up meanwhile, to be gone on from
  switch (leftover->kind) {
    case Leftover::Kind::kTemporary:
      storage.remove_file(leftover->path);
      break;
    case Leftover::Kind::kUnfinished:  // of a public name; it holds its mark alone
      if (checkpoint::remove_if_it_holds(storage, leftover->path, 1)) break;
      leftover->kept = "files came into it meanwhile";
      return;
    default:
      storage.remove_tree(leftover->path);
  }
  leftover->removed = true;
}

}  // namespace isoshard::reshard
