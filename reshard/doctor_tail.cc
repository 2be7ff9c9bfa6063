// A shorter archive written over a longer one without cutting the file off:
//
//   | records of the new file | its directory | its end record | … the old directory | old end |
//
// Readers look for an end record at the end of the file and so find the old one. The new archive is
// found from its front: every local header says where its data begins, data.pkl says how long each
// data/KEY is, and the archive that this ends in must pass every check of zip.h.
#include <algorithm>
#include <unordered_map>

#include "checkpoint/format/pickle_reader.h"
#include "checkpoint/format/torch_file.h"
#include "checkpoint/format/zip.h"
#include "checkpoint/format/zip_fields.h"
#include "core/error.h"
#include "reshard/doctor_rules.h"

namespace isoshard::reshard {
namespace {

using namespace checkpoint::zip;
using checkpoint::Kind;
using checkpoint::NodeId;

constexpr int64_t kSmallRecord = 4096, kStep = 1 << 16;

// Empty where not all of it lies in the file.
std::string bytes_of(const ReadableFile& file, int64_t offset, int64_t count) {
  if (offset < 0 || count < 0 || offset > file.size_bytes() - count) return "";
  std::string text(static_cast<size_t>(count), '\0');
  file.read_at(offset, std::as_writable_bytes(std::span(text)));
  return text;
}

bool has_signature(const std::string& bytes, uint32_t signature) {
  return bytes.size() >= 4 && load(bytes, 0, 4) == signature;
}

// The size in a local header that has it: in its zip64 field where the header itself says so.
std::optional<int64_t> size_in(const std::string& header, const std::string& extra) {
  const auto size = static_cast<int64_t>(load(header, 22, 4));
  if (size != kMax32) return size;
  for (size_t at = 0; at + 4 <= extra.size();) {
    const size_t id = load(extra, at, 2), length = load(extra, at + 2, 2);
    if (id == kZip64Extra && length >= 8 && at + 12 <= extra.size()) {
      const uint64_t real = load(extra, at + 4, 8);
      if (real <= static_cast<uint64_t>(INT64_MAX / 2)) return static_cast<int64_t>(real);
      return std::nullopt;
    }
    at += 4 + length;
  }
  return std::nullopt;
}

// The first bytes of a file as a file of their own.
class Front : public ReadableFile {
 public:
  Front(const ReadableFile& file, int64_t size_bytes) : file_(file), size_bytes_(size_bytes) {}
  const std::string& path() const override { return file_.path(); }
  int64_t size_bytes() const override { return size_bytes_; }
  void read_at(int64_t offset, std::span<std::byte> target) const override {
    file_.read_at(offset, target);
  }
  int64_t next_data(int64_t offset) const override {
    return std::min(size_bytes_, file_.next_data(offset));
  }
  int64_t next_hole(int64_t offset) const override {
    return std::min(size_bytes_, file_.next_hole(offset));
  }

 private:
  const ReadableFile& file_;
  int64_t size_bytes_;
};

class Walk {
 public:
  explicit Walk(const ReadableFile& file) : file_(file) {}

  std::optional<int64_t> run() {
    int64_t at = 0;
    while (signature(at) == kLocalSignature) {
      const std::optional<int64_t> next = behind_record(at);
      if (!next) return std::nullopt;
      at = *next;
    }
    if (at == 0) return std::nullopt;
    while (signature(at) == kCentralSignature) {
      const std::string entry = bytes(at, kCentralBytes);
      if (entry.empty()) return std::nullopt;
      at += kCentralBytes +
            static_cast<int64_t>(load(entry, 28, 2) + load(entry, 30, 2) + load(entry, 32, 2));
    }
    if (signature(at) == kEnd64Signature) at += kEnd64Bytes;
    if (signature(at) == kLocatorSignature) at += kLocatorBytes;
    if (signature(at) != kEndSignature || bytes(at, kEndBytes).empty()) return std::nullopt;
    return at + kEndBytes;
  }

  bool went_beyond() const { return beyond_; }

 private:
  // Empty beyond the end of the file.
  std::string bytes(int64_t offset, int64_t count) {
    std::string text = bytes_of(file_, offset, count);
    beyond_ = beyond_ || static_cast<int64_t>(text.size()) < count;
    return text;
  }
  uint64_t signature(int64_t offset) {
    const std::string text = bytes(offset, 4);
    return text.empty() ? 0 : load(text, 0, 4);
  }
  std::optional<int64_t> behind_record(int64_t at);
  std::optional<int64_t> find_size(int64_t data, int64_t limit);
  void read_sizes(int64_t data, int64_t size_bytes);

  const ReadableFile& file_;
  std::unordered_map<std::string, int64_t> sizes_;  // by key of data/KEY
  bool beyond_ = false;                             // something was to lie behind the file's end
};

std::optional<int64_t> Walk::behind_record(int64_t at) {
  const std::string header = bytes(at, kLocalBytes);
  if (header.empty()) return std::nullopt;
  const auto name_bytes = static_cast<int64_t>(load(header, 26, 2));
  const std::string path = bytes(at + kLocalBytes, name_bytes);
  const std::string extra =
      bytes(at + kLocalBytes + name_bytes, static_cast<int64_t>(load(header, 28, 2)));
  const int64_t data = at + kLocalBytes + name_bytes + static_cast<int64_t>(load(header, 28, 2));
  const size_t slash = path.find('/');
  if (slash == std::string::npos) return std::nullopt;
  const std::string name = path.substr(slash + 1);
  const bool deferred = (load(header, 6, 2) & 0x8) != 0;
  std::optional<int64_t> size = size_in(header, extra);
  if (deferred && name.starts_with("data/")) {
    const auto known = sizes_.find(name.substr(5));
    if (known == sizes_.end()) return std::nullopt;
    size = known->second;
  } else if (deferred) {
    const bool pickle = name == "data.pkl";
    size = find_size(data, pickle ? checkpoint::PickleLimits{}.stream_bytes : kSmallRecord);
    if (size && pickle) read_sizes(data, *size);
  }
  if (!size) return std::nullopt;
  if (!deferred) return data + *size;
  return data + *size + (local_zip64(*size, at).empty() ? 16 : 24);
}

// The size of a record whose descriptor follows it: the descriptor itself must say that size.
std::optional<int64_t> Walk::find_size(int64_t data, int64_t limit) {
  const int64_t end = std::min(file_.size_bytes(), data + limit + 16);
  for (int64_t from = data; from + 16 <= end; from += kStep - 16) {
    const std::string window = bytes(from, std::min(kStep, end - from));
    for (size_t i = window.find("PK\x07\x08"); i != std::string::npos && i + 16 <= window.size();
         i = window.find("PK\x07\x08", i + 1)) {
      const int64_t size = from + static_cast<int64_t>(i) - data;
      if (load(window, i + 8, 4) == static_cast<uint64_t>(size) &&
          load(window, i + 12, 4) == static_cast<uint64_t>(size))
        return size;
    }
  }
  beyond_ = beyond_ || end == file_.size_bytes();
  return std::nullopt;
}

void Walk::read_sizes(int64_t data, int64_t size_bytes) {
  const checkpoint::Pickle pickle = checkpoint::read_pickle(bytes(data, size_bytes), file_.path());
  for (NodeId node = 0; node < pickle.size(); ++node) {
    if (pickle.kind(node) != Kind::kPersistent) continue;
    const NodeId id = pickle.persistent_id(node);
    if (pickle.kind(id) != Kind::kTuple || pickle.items(id).size() != 5) continue;
    const std::vector<NodeId>& parts = pickle.items(id);
    if (pickle.kind(parts[1]) != Kind::kGlobal || pickle.kind(parts[2]) != Kind::kString ||
        pickle.kind(parts[4]) != Kind::kInt)
      continue;
    const int64_t numel = pickle.integer_value(parts[4]);
    if (numel < 0 || numel > file_.size_bytes()) continue;
    const int64_t width = checkpoint::storage_item_bytes(pickle.attribute(parts[1]));
    sizes_[pickle.text(parts[2])] = numel * std::max<int64_t>(width, 1);
  }
}

}  // namespace

ArchiveFront archive_front(const ReadableFile& file) {
  ArchiveFront front;
  try {
    Walk walk(file);
    const std::optional<int64_t> bytes = walk.run();
    front.cut_short = !bytes && walk.went_beyond();
    if (bytes) checkpoint::read_zip_index(Front(file, *bytes));
    front.whole_bytes = bytes;
  } catch (const Error& error) {
    if (error.info().code == ErrorCode::kInterrupted) throw;
  }
  return front;
}

ArchiveTail archive_tail(const ReadableFile& file, int64_t whole_bytes) {
  int64_t directory_end = file.size_bytes() - kEndBytes;
  const std::string end = bytes_of(file, directory_end, kEndBytes);
  if (!has_signature(end, kEndSignature)) return ArchiveTail::kNone;
  uint64_t size = load(end, 12, 4), offset = load(end, 16, 4);
  const int64_t end64_at = directory_end - kLocatorBytes - kEnd64Bytes;
  const std::string locator = bytes_of(file, directory_end - kLocatorBytes, kLocatorBytes);
  const std::string end64 = bytes_of(file, end64_at, kEnd64Bytes);
  const bool large = size == kMax32 || offset == kMax32;
  if (has_signature(locator, kLocatorSignature) && has_signature(end64, kEnd64Signature)) {
    if (load(locator, 8, 8) != static_cast<uint64_t>(end64_at)) return ArchiveTail::kOther;
    size = load(end64, 40, 8);
    offset = load(end64, 48, 8);
    directory_end = end64_at;
  } else if (large) {
    return ArchiveTail::kOther;
  } else if (end64_at < whole_bytes && offset + size == static_cast<uint64_t>(end64_at)) {
    directory_end = end64_at;  // its zip64 records lie under the newer archive
  }
  if (offset > static_cast<uint64_t>(directory_end) ||
      size != static_cast<uint64_t>(directory_end) - offset)
    return ArchiveTail::kOther;
  // A tool that appends may count from the file's first byte too: then nothing of what it appends
  // lies in the first archive, and its first record does not stand at byte 0.
  const auto begin = static_cast<int64_t>(offset);
  if (begin < whole_bytes) return ArchiveTail::kInPlace;
  const std::string entry = bytes_of(file, begin, kCentralBytes);
  const bool first = has_signature(entry, kCentralSignature) && load(entry, 42, 4) == 0;
  return first ? ArchiveTail::kInPlace : ArchiveTail::kOther;
}

}  // namespace isoshard::reshard
