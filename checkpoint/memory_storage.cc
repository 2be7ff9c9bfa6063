// One ordered map from canonical path to node: what lies in a folder are the keys that begin with
// its path and a '/', so that moving and removing a folder are loops over a range.
#include "checkpoint/memory_storage.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "core/check.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

struct MemoryContents {
  std::mutex mutex;
  std::vector<std::byte> bytes;
};

using Contents = std::shared_ptr<MemoryContents>;

struct Failure {
  ErrorCode code;
  std::string what;
  const std::string& path;
};

[[noreturn]] void fail(Failure failure) {
  throw Error(ErrorInfo{.code = failure.code,
                        .what = std::move(failure.what),
                        .file = failure.path,
                        .next = "check the path"});
}

std::string canonical_path(const std::string& path) {
  std::vector<std::string> components;
  for (size_t begin = 0; begin <= path.size();) {
    const size_t end = std::min(path.find('/', begin), path.size());
    const std::string component = path.substr(begin, end - begin);
    begin = end + 1;
    if (component.empty() || component == ".") continue;
    if (component != "..") {
      components.push_back(component);
    } else if (!components.empty()) {
      components.pop_back();
    }
  }
  std::string result;
  for (const std::string& component : components) result += "/" + component;
  return result.empty() ? "/" : result;
}

// What all keys inside the folder begin with.
std::string inside(const std::string& folder) { return folder == "/" ? "/" : folder + "/"; }

class MemoryReadableFile final : public ReadableFile {
 public:
  MemoryReadableFile(std::string path, Contents contents)
      : path_(std::move(path)), contents_(std::move(contents)) {
    const std::lock_guard lock(contents_->mutex);
    size_bytes_ = static_cast<int64_t>(contents_->bytes.size());
  }

  const std::string& path() const override { return path_; }
  int64_t size_bytes() const override { return size_bytes_; }

  void read_at(int64_t offset, std::span<std::byte> target) const override {
    CHECK(offset >= 0, "read before the beginning of " + path_);
    const std::lock_guard lock(contents_->mutex);
    const auto now_bytes = static_cast<int64_t>(contents_->bytes.size());
    const auto count = static_cast<int64_t>(target.size());
    if (count == 0) return;
    if (offset > now_bytes || count > now_bytes - offset) {
      throw Error(ErrorInfo{.code = ErrorCode::kCorrupt,
                            .what = "The file ends before the bytes it must hold.",
                            .file = path_,
                            .expected = "at least " + std::to_string(offset) + " + " +
                                        std::to_string(count) + " bytes",
                            .found = std::to_string(now_bytes) + " bytes",
                            .next = "copy the file again from where it came"});
    }
    std::copy_n(contents_->bytes.begin() + offset, count, target.begin());
  }

  int64_t next_data(int64_t offset) const override { return std::min(offset, size_bytes_); }
  int64_t next_hole(int64_t) const override { return size_bytes_; }

 private:
  std::string path_;
  Contents contents_;
  int64_t size_bytes_ = 0;
};

class MemoryWritableFile final : public WritableFile {
 public:
  MemoryWritableFile(std::string path, Contents contents)
      : path_(std::move(path)), contents_(std::move(contents)) {}

  void write_at(int64_t offset, std::span<const std::byte> bytes) override {
    CHECK(offset >= 0, "write before the beginning of " + path_);
    check_open();
    const std::lock_guard lock(contents_->mutex);
    const size_t end = static_cast<size_t>(offset) + bytes.size();
    if (!bytes.empty() && contents_->bytes.size() < end) contents_->bytes.resize(end);
    std::copy(bytes.begin(), bytes.end(), contents_->bytes.begin() + offset);
  }

  void set_size(int64_t size_bytes) override {
    CHECK(size_bytes >= 0, "negative size for " + path_);
    check_open();
    const std::lock_guard lock(contents_->mutex);
    contents_->bytes.resize(static_cast<size_t>(size_bytes));
  }

  void sync() override { check_open(); }

  void close() override {
    check_open();
    is_open_ = false;
  }

 private:
  void check_open() const { CHECK(is_open_, "use of a closed file: " + path_); }

  std::string path_;
  Contents contents_;
  bool is_open_ = true;
};

}  // namespace

struct MemoryTree {
  std::mutex mutex;
  std::map<std::string, Contents> nodes = {{"/", nullptr}};  // a folder has no contents

  using Iterator = std::map<std::string, Contents>::iterator;

  Iterator find(const std::string& path) {
    const auto node = nodes.find(canonical_path(path));
    if (node == nodes.end()) fail({ErrorCode::kNotFound, "No such file or folder.", path});
    return node;
  }

  Iterator find_file(const std::string& path) {
    const auto node = find(path);
    if (!node->second) {
      fail({ErrorCode::kUnreadable, "A folder stands where a file is needed.", path});
    }
    return node;
  }

  Iterator find_folder(const std::string& path) {
    const auto node = find(path);
    if (node->second) {
      fail({ErrorCode::kUnreadable, "A file stands where a folder is needed.", path});
    }
    return node;
  }

  void require_parent(const std::string& path) { find_folder(canonical_path(path + "/..")); }

  void add(const std::string& path, Contents contents) {
    require_parent(path);
    if (!nodes.emplace(canonical_path(path), std::move(contents)).second) {
      fail({ErrorCode::kExists, "The name is already taken.", path});
    }
  }

  // The node and everything inside it, taken out of the map; keys lose the node's path.
  std::vector<std::pair<std::string, Contents>> take(const std::string& path) {
    const std::string top = find(path)->first;
    if (top == "/") fail({ErrorCode::kPermission, "The root cannot be moved or removed.", path});
    std::vector<std::pair<std::string, Contents>> taken;
    taken.emplace_back("", nodes.extract(top).mapped());
    const std::string prefix = inside(top);
    auto node = nodes.lower_bound(prefix);
    while (node != nodes.end() && node->first.starts_with(prefix)) {
      taken.emplace_back(node->first.substr(top.size()), std::move(node->second));
      node = nodes.erase(node);
    }
    return taken;
  }

  void put(const std::string& path, std::vector<std::pair<std::string, Contents>> taken) {
    const std::string top = canonical_path(path);
    for (auto& [name, contents] : taken) nodes[top + name] = std::move(contents);
  }

  bool is_empty_folder(Iterator node) {
    const std::string prefix = inside(node->first);
    const auto first = nodes.lower_bound(prefix);
    return !node->second && (first == nodes.end() || !first->first.starts_with(prefix));
  }

  // Both names must be able to take each other's place.
  void require_apart(const std::string& a, const std::string& b) {
    require_parent(b);
    const std::string first = canonical_path(a);
    const std::string second = canonical_path(b);
    if (second.starts_with(inside(first)) || first.starts_with(inside(second))) {
      fail({ErrorCode::kUnreadable, "A folder cannot be moved into or over what it is in.", b});
    }
  }
};

MemoryStorage::MemoryStorage() : tree_(std::make_unique<MemoryTree>()) {}
MemoryStorage::~MemoryStorage() = default;

std::unique_ptr<ReadableFile> MemoryStorage::open_read(const std::string& path) {
  const std::lock_guard lock(tree_->mutex);
  return std::make_unique<MemoryReadableFile>(path, tree_->find_file(path)->second);
}

std::unique_ptr<WritableFile> MemoryStorage::create(const std::string& path) {
  const std::lock_guard lock(tree_->mutex);
  auto contents = std::make_shared<MemoryContents>();
  tree_->add(path, contents);
  return std::make_unique<MemoryWritableFile>(path, std::move(contents));
}

std::unique_ptr<WritableFile> MemoryStorage::open_write(const std::string& path) {
  const std::lock_guard lock(tree_->mutex);
  return std::make_unique<MemoryWritableFile>(path, tree_->find_file(path)->second);
}

std::vector<DirectoryEntry> MemoryStorage::list(const std::string& directory) {
  const std::lock_guard lock(tree_->mutex);
  const std::string prefix = inside(tree_->find_folder(directory)->first);
  std::vector<DirectoryEntry> entries;
  auto node = tree_->nodes.lower_bound(prefix);
  for (; node != tree_->nodes.end() && node->first.starts_with(prefix); ++node) {
    const std::string name = node->first.substr(prefix.size());
    if (name.empty() || name.find('/') != std::string::npos) continue;
    DirectoryEntry entry{.name = name, .kind = DirectoryEntry::Kind::kDirectory};
    if (node->second) {
      const std::lock_guard contents_lock(node->second->mutex);
      entry.kind = DirectoryEntry::Kind::kFile;
      entry.size_bytes = static_cast<int64_t>(node->second->bytes.size());
    }
    entries.push_back(std::move(entry));
  }
  return entries;
}

bool MemoryStorage::is_file(const std::string& path) {
  const std::lock_guard lock(tree_->mutex);
  const auto node = tree_->nodes.find(canonical_path(path));
  return node != tree_->nodes.end() && node->second;
}

bool MemoryStorage::is_directory(const std::string& path) {
  const std::lock_guard lock(tree_->mutex);
  const auto node = tree_->nodes.find(canonical_path(path));
  return node != tree_->nodes.end() && !node->second;
}

void MemoryStorage::make_directories(const std::string& path) {
  const std::lock_guard lock(tree_->mutex);
  const std::string whole = canonical_path(path);
  for (size_t end = 1; end <= whole.size() && whole != "/";) {
    end = std::min(whole.find('/', end), whole.size());
    const std::string prefix = whole.substr(0, end++);
    if (tree_->nodes.contains(prefix)) {
      tree_->find_folder(prefix);
    } else {
      tree_->add(prefix, nullptr);
    }
  }
}

void MemoryStorage::make_directory(const std::string& path) {
  const std::lock_guard lock(tree_->mutex);
  tree_->add(path, nullptr);
}

bool MemoryStorage::rename_if_absent(const std::string& from, const std::string& to) {
  const std::lock_guard lock(tree_->mutex);
  tree_->find(from);
  tree_->require_parent(to);
  if (tree_->nodes.contains(canonical_path(to))) return false;
  tree_->require_apart(from, to);
  tree_->put(to, tree_->take(from));
  return true;
}

void MemoryStorage::rename_over(const std::string& from, const std::string& to) {
  const std::lock_guard lock(tree_->mutex);
  const auto source = tree_->find(from);
  tree_->require_apart(from, to);
  const auto target = tree_->nodes.find(canonical_path(to));
  if (target == source) return;
  if (target != tree_->nodes.end()) {
    if (!source->second != !target->second) {
      fail({ErrorCode::kUnreadable, "A file and a folder cannot replace each other.", to});
    }
    if (!target->second && !tree_->is_empty_folder(target)) {
      fail({ErrorCode::kExists, "The folder to replace is not empty.", to});
    }
  }
  tree_->put(to, tree_->take(from));
}

void MemoryStorage::exchange(const std::string& a, const std::string& b) {
  const std::lock_guard lock(tree_->mutex);
  if (tree_->find(a) == tree_->find(b)) return;
  tree_->require_apart(a, b);
  auto first = tree_->take(a);
  auto second = tree_->take(b);
  tree_->put(a, std::move(second));
  tree_->put(b, std::move(first));
}

void MemoryStorage::remove_file(const std::string& path) {
  const std::lock_guard lock(tree_->mutex);
  tree_->nodes.erase(tree_->find_file(path));
}

void MemoryStorage::remove_tree(const std::string& path) {
  const std::lock_guard lock(tree_->mutex);
  tree_->take(path);
}

void MemoryStorage::sync_directory(const std::string& path) {
  const std::lock_guard lock(tree_->mutex);
  tree_->find_folder(path);
}

void MemoryStorage::sync_everything(const std::string& path) {
  const std::lock_guard lock(tree_->mutex);
  tree_->find(path);
}

FreeSpace MemoryStorage::free_space(const std::string&) {
  return FreeSpace{.bytes = free_bytes_, .inodes = -1};
}

std::string MemoryStorage::canonical(const std::string& path) { return canonical_path(path); }

}  // namespace isoshard::checkpoint
