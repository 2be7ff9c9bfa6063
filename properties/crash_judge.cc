// See crash_judge.h.
#include "properties/crash_judge.h"

#include <algorithm>

#include "checkpoint/publication.h"
#include "core/check.h"
#include "core/error.h"

namespace isoshard::properties {
namespace {

constexpr int kUnfinishedReads = 4;

void add_tree(Storage& storage, const std::string& folder, Tree* tree) {
  for (const DirectoryEntry& entry : storage.list(folder)) {
    if (!is_shown(entry.name)) continue;
    const std::string path = (folder == "/" ? "" : folder) + "/" + entry.name;
    if (entry.kind == DirectoryEntry::Kind::kDirectory) {
      (*tree)[path + "/"] = "";
      add_tree(storage, path, tree);
    } else {
      (*tree)[path] = read_small_file(storage, path, int64_t{1} << 30);
    }
  }
}

bool lies_in(const std::string& path, const std::string& place) {
  return path == place || path.starts_with(place + "/");
}

Tree part_of(const Tree& tree, const std::string& place) {
  Tree part;
  for (const auto& [path, bytes] : tree) {
    if (lies_in(path, place)) part[path] = bytes;
  }
  return part;
}

std::string folder_of(const std::string& path) { return path.substr(0, path.rfind('/')); }

std::string quoted(const std::string& path) { return quote(path.substr(0, 200)); }

// Which path tells two trees apart.
std::string difference(const Tree& found, const Tree& expected) {
  for (const auto& [path, bytes] : expected) {
    const auto other = found.find(path);
    if (other == found.end()) return quoted(path) + " is missing";
    if (other->second != bytes) return quoted(path) + " has other bytes";
  }
  for (const auto& [path, bytes] : found) {
    if (!expected.contains(path)) return quoted(path) + " is too much";
  }
  return "nothing differs";
}

void copy_folder(Storage& from, const std::string& folder, Storage& to) {
  for (const DirectoryEntry& entry : from.list(folder)) {
    const std::string path = (folder == "/" ? "" : folder) + "/" + entry.name;
    if (entry.kind == DirectoryEntry::Kind::kDirectory) {
      to.make_directory(path);
      copy_folder(from, path, to);
      continue;
    }
    const std::string text = read_small_file(from, path, int64_t{1} << 30);
    const std::unique_ptr<WritableFile> file = to.create(path);
    file->write_at(0, std::as_bytes(std::span(text)));
    file->close();
  }
}

}  // namespace

Tree tree_of(Storage& storage) {
  Tree tree;
  add_tree(storage, "/", &tree);
  return tree;
}

void copy_disk(Storage& from, Storage& to) { copy_folder(from, "/", to); }

Judge::Judge(const CrashJob& job, Storage& before, Storage& behind, bool in_place)
    : job_(job),
      in_place_(in_place),
      old_(tree_of(before)),
      new_(tree_of(behind)),
      old_read_(job.read(before, job.read_at)),
      new_read_(job.read(behind, job.read_at)) {
  CHECK(job.read_at.empty() || !new_read_.empty(), "no reader takes what this makes: " + job.name);
}

uint64_t Judge::changed() const {
  uint64_t bits = 0;
  for (size_t i = 0; i < job_.places.size(); ++i) {
    const std::string& place = job_.places[i];
    if (part_of(old_, place) != part_of(new_, place)) bits |= uint64_t{1} << i;
  }
  return bits;
}

Finding Judge::judge(Storage& storage) {
  const Tree tree = tree_of(storage);
  Finding finding{.failure = changed_elsewhere(tree)};
  for (size_t i = 0; i < job_.places.size() && finding.failure.empty(); ++i) {
    const Tree part = part_of(tree, job_.places[i]);
    if (part == part_of(new_, job_.places[i])) finding.arrived |= uint64_t{1} << i;
    finding.failure = torn(part, job_.places[i]);
  }
  if (finding.failure.empty()) finding.failure = misled(tree, finding.arrived);
  if (finding.failure.empty()) finding.failure = misread(storage, tree, finding.arrived);
  if (finding.failure.empty()) finding.failure = unlisted(storage);
  return finding;
}

// Nothing but the places may change; folders on the way to them may appear.
std::string Judge::changed_elsewhere(const Tree& tree) const {
  Tree found = tree, expected = old_;
  std::erase_if(found, [&](const auto& entry) {
    return !old_.contains(entry.first) && std::ranges::any_of(job_.places, [&](const auto& place) {
      return lies_in(entry.first, place) || place.starts_with(entry.first);
    });
  });
  for (const std::string& place : job_.places) {
    const auto inside = [&](const auto& entry) { return lies_in(entry.first, place); };
    std::erase_if(found, inside);
    std::erase_if(expected, inside);
  }
  return found == expected ? "" : "Beside the places, " + difference(found, expected) + ".";
}

// In place, a folder may be at work: it has a mark then, or nothing at all.
bool Judge::is_at_work(const Tree& part, const std::string& place) const {
  if (!in_place_ || !part.contains(place + "/")) return false;
  const auto mark = part.lower_bound(place + "/.isoshard-");
  return part.size() == 1 || (mark != part.end() && mark->first.starts_with(place + "/.isoshard-"));
}

std::string Judge::torn(const Tree& part, const std::string& place) const {
  const Tree before = part_of(old_, place), behind = part_of(new_, place);
  if (part == before || part == behind || is_at_work(part, place)) return "";
  return quoted(place) + " is neither the old (" + difference(part, before) + ") nor the new (" +
         difference(part, behind) + ").";
}

// The pointer names a folder that is whole, and the new one if it is new itself.
std::string Judge::misled(const Tree& tree, uint64_t arrived) const {
  const auto pointer = tree.find(job_.pointer);
  if (pointer == tree.end()) return "";
  const std::string named = folder_of(job_.pointer) + "/" + pointer->second;
  const Tree part = part_of(tree, named);
  if (part.size() < 2 || is_at_work(part, named)) {
    return quoted(job_.pointer) + " names " + quoted(named) + ", which is not whole.";
  }
  const auto old_pointer = old_.find(job_.pointer);
  const bool is_new = old_pointer == old_.end() || old_pointer->second != pointer->second;
  for (size_t i = 0; i < job_.places.size() && is_new; ++i) {
    if (job_.places[i] == named && (arrived >> i & 1) == 0) {
      return quoted(job_.pointer) + " is new, " + quoted(named) + " is not.";
    }
  }
  return "";
}

std::string Judge::misread(Storage& storage, const Tree& tree, uint64_t arrived) {
  for (const std::string& place : job_.places) {
    if (!is_at_work(part_of(tree, place), place)) continue;
    if (++unfinished_reads_[arrived] > kUnfinishedReads) return "";
    if (!job_.read(storage, place).empty()) return quoted(place) + " is unfinished, and is read.";
  }
  const std::string found = job_.read(storage, job_.read_at);
  const bool may_be_old = arrived != all(), may_be_new = arrived != 0 || new_read_ == old_read_;
  if ((may_be_old && found == old_read_) || (may_be_new && found == new_read_)) return "";
  return "The reader finds " + quoted(found) + ", not " + quoted(old_read_) + " or " +
         quoted(new_read_) + ".";
}

// What is not shown is known for what it is.
std::string Judge::unlisted(Storage& storage) const {
  for (const std::string& place : job_.places) {
    const std::string parent = folder_of(place);
    if (!storage.is_directory(parent)) continue;
    const std::vector<std::string> known = checkpoint::leftovers(storage, parent);
    for (const DirectoryEntry& entry : storage.list(parent)) {
      if (is_shown(entry.name) || std::ranges::count(known, entry.name) > 0) continue;
      return quoted(parent + "/" + entry.name) + " is not known as a leftover.";
    }
  }
  return "";
}

}  // namespace isoshard::properties
