// See volatile_storage_disk.h. Survivors is the disk that a machine finds when power is back.
#include "checkpoint/volatile_storage_disk.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "checkpoint/hidden_name.h"
#include "core/check.h"
#include "core/random.h"

namespace isoshard::checkpoint {
namespace {

constexpr uint64_t kUnitKey = 1, kBlockKey = 2, kCutKey = 3, kRangeKey = 4, kEditKey = 5;
constexpr uint64_t kHiddenMark = 6;

uint64_t hash_bytes(std::span<const std::byte> bytes) {
  uint64_t hash = mix(bytes.size());
  size_t at = 0;
  for (; at + 8 <= bytes.size(); at += 8) {
    uint64_t word = 0;
    std::memcpy(&word, bytes.data() + at, 8);
    hash = (hash ^ word) * 0x9E3779B97F4A7C15ull;
    hash ^= hash >> 29;
  }
  uint64_t word = 0;
  if (at < bytes.size()) std::memcpy(&word, bytes.data() + at, bytes.size() - at);
  return mix(hash ^ word);
}

// What a hidden name is the same by in every run.
std::string without_nonce(const std::string& name) {
  for (const char* mark : {kStagingMark, kTrashMark}) {
    if (ends_in_nonce(name, mark)) return name.substr(0, name.rfind(mark)) + mark;
  }
  return name;
}

uint64_t hash_text(const std::string& text) { return hash_bytes(std::as_bytes(std::span(text))); }

int64_t size_of(const std::vector<std::byte>& bytes) { return static_cast<int64_t>(bytes.size()); }

// Sectors of a disk or pages of a cache.
int64_t unit_bytes(uint64_t seed, uint64_t node) {
  return keyed_random(seed, {kUnitKey, node}) % 2 == 0 ? 512 : 4096;
}

}  // namespace

std::string name(Durability model) { return "D" + std::to_string(static_cast<int>(model)); }

VolatileDisk::VolatileDisk() : nodes_(1) { nodes_[0].is_folder = true; }

int VolatileDisk::node_at(const std::string& canonical_path) const {
  int node = 0;
  for (size_t begin = 1; begin < canonical_path.size();) {
    const size_t end = std::min(canonical_path.find('/', begin), canonical_path.size());
    const Names& names = at(node).names.live;
    const auto found = names.find(canonical_path.substr(begin, end - begin));
    if (found == names.end()) return -1;
    node = found->second;
    begin = end + 1;
  }
  return node;
}

void VolatileDisk::apply_write(const PendingWrite& write, Bytes* bytes) {
  if (write.bytes == nullptr) {
    bytes->resize(static_cast<size_t>(write.size_bytes));
    return;
  }
  const int64_t end = write.offset_bytes + size_of(*write.bytes);
  if (!write.bytes->empty() && size_of(*bytes) < end) bytes->resize(static_cast<size_t>(end));
  std::copy(write.bytes->begin(), write.bytes->end(), bytes->begin() + write.offset_bytes);
}

// Two edits of one name, or of what is moved, reach the disk in their order.
bool VolatileDisk::builds_on(const Edits& later, const Edits& earlier) {
  return std::ranges::any_of(later, [&](const EntryEdit& a) {
    return std::ranges::any_of(earlier, [&](const EntryEdit& b) {
      return (a.folder == b.folder && a.name == b.name) || (a.node >= 0 && a.node == b.node);
    });
  });
}

uint64_t VolatileDisk::hash_of(const Contents& contents) {
  if (!contents.hash) contents.hash = hash_bytes(contents.bytes);
  return *contents.hash;
}

namespace {

void apply_edit(const EntryEdit& edit, std::map<std::string, int>* names) {
  if (edit.node < 0) {
    names->erase(edit.name);
  } else {
    (*names)[edit.name] = edit.node;
  }
}

}  // namespace

void VolatileDisk::sync_file(File* file) {
  if (file->pending.empty()) return;
  file->durable = file->live;
  file->pending.clear();
}

// The edits that are asked for, and those that they build on.
void VolatileDisk::sync_edits(const std::function<bool(const Edits&)>& is_asked) {
  std::vector<bool> is_taken(edits_.size());
  for (size_t i = edits_.size(); i-- > 0;) {
    is_taken[i] = is_asked(edits_[i]);
    for (size_t later = i + 1; later < edits_.size() && !is_taken[i]; ++later) {
      is_taken[i] = is_taken[later] && builds_on(edits_[later], edits_[i]);
    }
  }
  std::vector<Edits> left;
  for (size_t i = 0; i < edits_.size(); ++i) {
    if (!is_taken[i]) {
      left.push_back(std::move(edits_[i]));
      continue;
    }
    for (const EntryEdit& edit : edits_[i]) apply_edit(edit, &at(edit.folder).names.durable);
  }
  edits_ = std::move(left);
}

void VolatileDisk::apply(const DiskOperation& operation) {
  using Kind = DiskOperation::Kind;
  switch (operation.kind) {
    case Kind::kEdit:
      if (operation.makes != DiskOperation::Makes::kNothing) {
        nodes_.push_back({.is_folder = operation.makes == DiskOperation::Makes::kFolder,
                          .file = {},
                          .names = {}});
      }
      for (const EntryEdit& edit : operation.edits) {
        CHECK(edit.node < next_node() && at(edit.folder).is_folder, operation.text);
        apply_edit(edit, &at(edit.folder).names.live);
      }
      edits_.push_back(operation.edits);
      break;
    case Kind::kWrite:
    case Kind::kResize: {
      File& file = at(operation.node).file;
      file.pending.push_back({operation.offset_bytes, operation.bytes, operation.size_bytes});
      apply_write(file.pending.back(), &file.live.bytes);
      file.live.hash.reset();
      break;
    }
    case Kind::kSyncFile:
      sync_file(&at(operation.node).file);
      break;
    case Kind::kSyncFolder:
      sync_edits([&](const Edits& edits) {
        return std::ranges::any_of(
            edits, [&](const EntryEdit& edit) { return edit.folder == operation.node; });
      });
      break;
    case Kind::kSyncEverything:
      for (Node& node : nodes_) sync_file(&node.file);
      sync_edits([](const Edits&) { return true; });
      break;
  }
}

class VolatileDisk::Survivors {
 public:
  Survivors(const VolatileDisk& disk, const Crash& crash) : disk_(disk), crash_(crash) {
    if (crash.model == Durability::kReordered) choose_edits();
  }

  const Names& names_in(int folder) const {
    if (crash_.model == Durability::kLostEntries) return disk_.at(folder).names.durable;
    if (crash_.model != Durability::kReordered) return disk_.at(folder).names.live;
    const auto changed = changed_.find(folder);
    return changed == changed_.end() ? disk_.at(folder).names.durable : changed->second;
  }

  uint64_t hash_of(int node) const {
    const File& file = disk_.at(node).file;
    const Contents* contents = unchanged(file);
    return contents != nullptr ? VolatileDisk::hash_of(*contents) : hash_bytes(mixed(node, file));
  }

  Bytes bytes_of(int node) const {
    const File& file = disk_.at(node).file;
    const Contents* contents = unchanged(file);
    return contents != nullptr ? contents->bytes : mixed(node, file);
  }

  uint64_t hash_tree(int folder, uint64_t path_hash, IsShown is_shown) const {
    uint64_t sum = 0;
    for (const auto& [name, node] : names_in(folder)) {
      if (!is_shown(name)) {
        sum += mix(mix(path_hash ^ hash_text(without_nonce(name))) ^ kHiddenMark);
        continue;
      }
      const uint64_t own_hash = mix(path_hash ^ hash_text(name));
      const bool is_folder = disk_.is_folder(node);
      sum += mix(own_hash ^ (is_folder ? 1 : mix(hash_of(node))));
      if (is_folder) sum += hash_tree(node, own_hash, is_shown);
    }
    return sum;
  }

  void copy_tree(int folder, const std::string& path, MemoryStorage* target) const {
    for (const auto& [name, node] : names_in(folder)) {
      const std::string own_path = path + "/" + name;
      if (disk_.is_folder(node)) {
        target->make_directory(own_path);
        copy_tree(node, own_path, target);
        continue;
      }
      const std::unique_ptr<WritableFile> file = target->create(own_path);
      file->write_at(0, bytes_of(node));
      file->close();
    }
  }

 private:
  // What holds the file's bytes as they are; none: they are a mixture.
  const Contents* unchanged(const File& file) const {
    const bool loses_data = crash_.model == Durability::kNoData ||
                            crash_.model == Durability::kReordered ||
                            (crash_.model == Durability::kLostEntries && crash_.seed % 2 == 1);
    if (loses_data) return &file.durable;
    const bool keeps_data = crash_.model == Durability::kEverything ||
                            crash_.model == Durability::kLostEntries || file.pending.empty();
    return keeps_data ? &file.live : nullptr;
  }

  Bytes mixed(int node, const File& file) const {
    if (crash_.model == Durability::kLostBlocks) return with_lost_blocks(node, file);
    if (crash_.model == Durability::kTornWrite) return torn(node, file);
    CHECK(crash_.model == Durability::kGarbage, "a model that mixes nothing");
    return with_garbage(node, file);
  }

  Bytes with_lost_blocks(int node, const File& file) const {
    const auto key = static_cast<uint64_t>(node);
    const int64_t unit = unit_bytes(crash_.seed, key);
    Bytes bytes = file.live.bytes;
    for (const PendingWrite& write : file.pending) {
      if (write.bytes == nullptr || write.bytes->empty()) continue;
      const int64_t end = std::min(write.offset_bytes + size_of(*write.bytes), size_of(bytes));
      for (int64_t at = write.offset_bytes / unit * unit; at < end; at += unit) {
        const bool is_lost =
            keyed_random(crash_.seed, {kBlockKey, key, static_cast<uint64_t>(at)}) % 2 == 0;
        if (is_lost) lay_old(file.durable.bytes, at, std::min(at + unit, size_of(bytes)), &bytes);
      }
    }
    return bytes;
  }

  // A range as another file has it; where that has none, zeros.
  static void lay_old(const Bytes& old, int64_t begin, int64_t end, Bytes* bytes) {
    const int64_t known = std::clamp(size_of(old), begin, std::max(begin, end));
    std::copy(old.begin() + std::min(begin, size_of(old)),
              old.begin() + std::min(known, size_of(old)), bytes->begin() + begin);
    std::fill(bytes->begin() + known, bytes->begin() + std::max(known, end), std::byte{0});
  }

  Bytes torn(int node, const File& file) const {
    const auto key = static_cast<uint64_t>(node);
    Bytes bytes = file.durable.bytes;
    for (size_t i = 0; i + 1 < file.pending.size(); ++i) apply_write(file.pending[i], &bytes);
    const PendingWrite& last = file.pending.back();
    const uint64_t word = keyed_random(crash_.seed, {kCutKey, key});
    if (last.bytes == nullptr) {
      if (word % 2 == 0) apply_write(last, &bytes);
      return bytes;
    }
    const int64_t unit = unit_bytes(crash_.seed, key);
    const int64_t end = last.offset_bytes + size_of(*last.bytes);
    const int64_t first = last.offset_bytes / unit, cuts = (end - 1) / unit - first + 2;
    const int64_t cut = (first + static_cast<int64_t>(word % static_cast<uint64_t>(cuts))) * unit;
    const int64_t kept = std::clamp(cut, last.offset_bytes, end) - last.offset_bytes;
    apply_write({.offset_bytes = last.offset_bytes,
                 .bytes = std::make_shared<Bytes>(last.bytes->begin(), last.bytes->begin() + kept)},
                &bytes);
    return bytes;
  }

  Bytes with_garbage(int node, const File& file) const {
    const auto key = static_cast<uint64_t>(node);
    Bytes bytes = file.live.bytes;
    for (size_t i = 0; i < file.pending.size(); ++i) {
      const PendingWrite& write = file.pending[i];
      if (write.bytes == nullptr) continue;
      const int64_t begin = std::min(write.offset_bytes, size_of(bytes));
      const int64_t end = std::min(write.offset_bytes + size_of(*write.bytes), size_of(bytes));
      Random random(keyed_random(crash_.seed, {kRangeKey, key, i}));
      const int64_t choice = random.below(3);  // 0: the range is as it was written
      if (choice == 1) {
        for (int64_t at = begin; at < end; at += 8) {
          const uint64_t word = random.next();
          std::memcpy(bytes.data() + at, &word,
                      static_cast<size_t>(std::min<int64_t>(8, end - at)));
        }
      } else if (choice == 2) {
        const int64_t other = random.below(disk_.next_node());
        lay_old(disk_.at(static_cast<int>(other)).file.durable.bytes, begin, end, &bytes);
      }
    }
    return bytes;
  }

  // By turns half of the edits, a single one, few of them, and nearly all.
  bool loses_edit(size_t number) const {
    const uint64_t word = keyed_random(crash_.seed, {kEditKey, number});
    switch (crash_.seed % 4) {
      case 0:
        return word % 2 == 0;
      case 1:  // consecutive seeds go through all of them, the last first
        return disk_.edits_.size() - 1 - number == crash_.seed / 4 % disk_.edits_.size();
      case 2:
        return word % 8 == 0;
      default:
        return word % 8 != 0;
    }
  }

  // Those that build on a lost one are lost with it.
  void choose_edits() {
    std::vector<const Edits*> lost;
    for (size_t i = 0; i < disk_.edits_.size(); ++i) {
      const Edits& edits = disk_.edits_[i];
      const bool is_lost = loses_edit(i) || std::ranges::any_of(lost, [&](const Edits* earlier) {
                             return builds_on(edits, *earlier);
                           });
      if (is_lost) {
        lost.push_back(&edits);
        continue;
      }
      for (const EntryEdit& edit : edits) {
        auto [changed, is_new] = changed_.try_emplace(edit.folder);
        if (is_new) changed->second = disk_.at(edit.folder).names.durable;
        apply_edit(edit, &changed->second);
      }
    }
  }

  const VolatileDisk& disk_;
  Crash crash_;
  std::map<int, Names> changed_;  // D4: folders that kept edits
};

int VolatileDisk::seeds_of(Durability model) const {
  if (model == Durability::kEverything || model == Durability::kNoData) return 1;
  if (model == Durability::kReordered) return edits_.empty() ? 1 : 0;
  const bool is_settled =
      std::ranges::all_of(nodes_, [](const Node& node) { return node.file.pending.empty(); });
  if (is_settled) return 1;
  return model == Durability::kLostEntries ? 2 : 0;
}

uint64_t VolatileDisk::hash_after(const Crash& crash, IsShown is_shown) const {
  return Survivors(*this, crash).hash_tree(0, 0, is_shown);
}

std::unique_ptr<MemoryStorage> VolatileDisk::after_crash(const Crash& crash) const {
  auto storage = std::make_unique<MemoryStorage>();
  Survivors(*this, crash).copy_tree(0, "", storage.get());
  return storage;
}

}  // namespace isoshard::checkpoint
