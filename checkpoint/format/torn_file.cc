// See torn_file.h. Every scan goes forward once; nothing is allocated from a declared size.
#include "checkpoint/format/torn_file.h"

#include <algorithm>
#include <charconv>
#include <map>
#include <string_view>

#include "checkpoint/format/crc.h"
#include "checkpoint/format/hostile_globals.h"
#include "checkpoint/format/pickle_reader.h"
#include "checkpoint/format/torch_file.h"
#include "checkpoint/format/zip_fields.h"
#include "core/error.h"
#include "core/utf8.h"

namespace isoshard::checkpoint {
namespace {

using namespace zip;

constexpr int64_t kWindowBytes = 1 << 20, kLongestName = 600;
constexpr int64_t kMostStorageBytes = int64_t{1} << 58;
constexpr std::string_view kLocalMark("PK\3\4", 4), kDescriptorMark("PK\7\10", 4);

[[noreturn]] void fail(ErrorCode code, const std::string& path, const std::string& what,
                       const std::string& entry, const std::string& found = "") {
  throw Error(ErrorInfo{.code = code,
                        .what = what,
                        .file = path,
                        .entry = entry,
                        .found = found,
                        .next = "look for another copy of this file"});
}

struct LocalHeader {
  std::string path;
  int64_t data_offset = 0;
  bool deferred = true;  // sizes and CRC stand in a descriptor behind the data
};

class Walker {
 public:
  explicit Walker(const ReadableFile& file) : file_(file), size_(file.size_bytes()) {}

  TornFile run() {
    read_pickle_record();
    for (int64_t bytes : storage_sizes(result_.pickle, file_.path()))
      result_.storages.push_back({bytes, std::nullopt, ""});
    find_storages();
    say_why();
    return std::move(result_);
  }

 private:
  std::string bytes_at(int64_t offset, int64_t most) const {
    std::string bytes(static_cast<size_t>(std::clamp<int64_t>(size_ - offset, 0, most)), '\0');
    if (!bytes.empty()) file_.read_at(offset, std::as_writable_bytes(std::span(bytes)));
    return bytes;
  }
  std::optional<LocalHeader> header_at(int64_t offset) const;
  int64_t next_header(int64_t from);
  void read_pickle_record();
  bool is_descriptor(std::string_view bytes, int64_t size_bytes, bool wide) const;
  void find_storages();
  int64_t take_storage(const LocalHeader& header, int64_t offset);
  void say_why();

  const ReadableFile& file_;
  int64_t size_;
  TornFile result_;
  int64_t cursor_ = 0;
  std::string window_;
  int64_t window_offset_ = 0;
};

// A header that torch writes: stored, without sizes, under a name of ordinary length.
std::optional<LocalHeader> Walker::header_at(int64_t offset) const {
  const std::string bytes = bytes_at(offset, kLocalBytes + kLongestName);
  if (bytes.size() < kLocalBytes || load(bytes, 0, 4) != kLocalSignature) return std::nullopt;
  const uint64_t flags = load(bytes, 6, 2), name_bytes = load(bytes, 26, 2);
  const bool known = (flags == kTorchFlags || flags == kEmptyFlags) && load(bytes, 8, 6) == 0 &&
                     load(bytes, 14, 8) == 0 && load(bytes, 22, 4) == 0;
  if (!known || bytes.size() < kLocalBytes + name_bytes) return std::nullopt;
  return LocalHeader{.path = bytes.substr(kLocalBytes, name_bytes),
                     .data_offset = offset + kLocalBytes + static_cast<int64_t>(name_bytes) +
                                    static_cast<int64_t>(load(bytes, 28, 2)),
                     .deferred = flags == kTorchFlags};
}

// The first place at or behind `from` where a local header's mark stands; the file's size if none.
int64_t Walker::next_header(int64_t from) {
  while (from + 4 <= size_) {
    const auto end = window_offset_ + static_cast<int64_t>(window_.size());
    if (from < window_offset_ || from + 4 > end) {
      window_ = bytes_at(from, kWindowBytes);
      window_offset_ = from;
    }
    const size_t found = window_.find(kLocalMark, static_cast<size_t>(from - window_offset_));
    if (found != std::string::npos) return window_offset_ + static_cast<int64_t>(found);
    from = window_offset_ + static_cast<int64_t>(window_.size()) - 3;  // a mark may begin there
    if (window_offset_ + static_cast<int64_t>(window_.size()) == size_) break;
  }
  return size_;
}

bool Walker::is_descriptor(std::string_view bytes, int64_t size_bytes, bool wide) const {
  const size_t width = wide ? 8 : 4;
  if (bytes.size() < 8 + 2 * width || !bytes.starts_with(kDescriptorMark)) return false;
  const auto size = static_cast<uint64_t>(size_bytes);
  return load(bytes, 8, width) == size && load(bytes, 8 + width, width) == size;
}

// data.pkl is the first record, and ends where a descriptor has its size and CRC.
void Walker::read_pickle_record() {
  const std::optional<LocalHeader> header = header_at(0);
  const size_t slash = header ? header->path.find('/') : std::string::npos;
  if (!header || slash == std::string::npos || header->path.substr(slash) != "/data.pkl" ||
      !header->deferred)
    fail(ErrorCode::kCorrupt, file_.path(), "The file does not begin as torch's archives do.",
         "first local header");
  if (const std::string why = why_unsafe_name(header->path); !why.empty())
    fail(ErrorCode::kHostile, file_.path(), "A zip record has an unsafe name: " + why + ".",
         quote(header->path));
  result_.prefix = header->path.substr(0, slash);
  const int64_t most = PickleLimits{}.stream_bytes + 24;
  std::string bytes;
  size_t from = 0;
  for (;;) {
    const auto read = static_cast<int64_t>(bytes.size());
    const std::string more =
        bytes_at(header->data_offset + read, std::min(kWindowBytes, most - read));
    if (more.empty())
      fail(ErrorCode::kIncomplete, file_.path(),
           "The file ends, or is damaged, before its data.pkl record does.", "data.pkl",
           std::to_string(size_) + " bytes");
    bytes += more;
    for (size_t at; (at = bytes.find(kDescriptorMark, from)) != std::string::npos; from = at + 1) {
      if (at + 16 > bytes.size()) break;
      if (!is_descriptor(std::string_view(bytes).substr(at), static_cast<int64_t>(at), false))
        continue;
      const uint32_t crc = crc32_of(std::as_bytes(std::span(bytes.data(), at)));
      if (crc == load(bytes, at + 4, 4)) {
        cursor_ = header->data_offset + static_cast<int64_t>(at) + 16;
        bytes.resize(at);
        result_.pickle = std::move(bytes);
        return;
      }
      fail(ErrorCode::kCorrupt, file_.path(), "A record's bytes do not fit its CRC.", "data.pkl",
           hex16(crc).substr(8));
    }
    if (from + 16 < bytes.size()) from = bytes.size() - 16;
  }
}

void Walker::find_storages() {
  while (cursor_ < size_) {
    const int64_t offset = next_header(cursor_);
    if (offset >= size_) return;
    const std::optional<LocalHeader> header = header_at(offset);
    cursor_ = header ? std::max(take_storage(*header, offset), offset + 4) : offset + 4;
  }
}

// Notes the record if it is a storage's, and says where the walk goes on.
int64_t Walker::take_storage(const LocalHeader& header, int64_t offset) {
  const std::string folder = result_.prefix + "/data/";
  size_t key = 0;
  const char* const end = header.path.data() + header.path.size();
  if (!header.path.starts_with(folder)) return header.data_offset;
  const auto [stop, failure] = std::from_chars(header.path.data() + folder.size(), end, key);
  if (failure != std::errc() || stop != end || key >= result_.storages.size())
    return header.data_offset;
  TornStorage& storage = result_.storages[key];
  if (storage.record)
    fail(ErrorCode::kHostile, file_.path(), "Two zip records have the same name.",
         quote(header.path));
  ZipRecord record{.name = "data/" + std::to_string(key),
                   .header_offset = offset,
                   .data_offset = header.data_offset,
                   .size_bytes = storage.size_bytes};
  if (storage.size_bytes == 0) {
    storage.record = record;
    return header.data_offset;
  }
  const bool wide = !local_zip64(storage.size_bytes, offset).empty();
  if (storage.size_bytes > size_ - header.data_offset) {
    storage.why = "truncated at byte " + std::to_string(size_) + " of the file, " +
                  std::to_string(std::max<int64_t>(size_ - header.data_offset, 0)) + " of its " +
                  std::to_string(storage.size_bytes) + " bytes are there";
    return header.data_offset;
  }
  const int64_t behind = header.data_offset + storage.size_bytes;
  const std::string descriptor = bytes_at(behind, wide ? 24 : 16);
  if (is_descriptor(descriptor, storage.size_bytes, wide)) {
    record.crc32 = static_cast<uint32_t>(load(descriptor, 4, 4));
    storage.record = record;
  } else if (descriptor.size() < (wide ? 24u : 16u)) {
    storage.why =
        "truncated at byte " + std::to_string(size_) + " of the file, before the record's CRC";
  } else {
    storage.why = "the descriptor behind the record, which holds its CRC, is damaged";
  }
  return behind;
}

void Walker::say_why() {
  for (TornStorage& storage : result_.storages) {
    if (!storage.record && storage.why.empty())
      storage.why =
          "no record of it was found in the file, which ends at byte " + std::to_string(size_);
  }
}

int64_t item_bytes_of(const std::string& type_name) {
  constexpr DType kDTypes[] = {DType::kFloat64,  DType::kFloat32,   DType::kFloat16,
                               DType::kBFloat16, DType::kInt64,     DType::kInt32,
                               DType::kInt16,    DType::kInt8,      DType::kUInt8,
                               DType::kBool,     DType::kComplex64, DType::kComplex128};
  if (type_name == "UntypedStorage") return 1;
  for (DType dtype : kDTypes) {
    if (storage_type_name(dtype) == type_name) return item_size_bytes(dtype);
  }
  return 0;
}

}  // namespace

std::vector<int64_t> storage_sizes(const std::string& bytes, const std::string& path) {
  const Pickle pickle = read_pickle(bytes, path);
  if (const HostileGlobal hostile = find_hostile_global(pickle); !hostile.name.empty())
    throw Error(ErrorInfo{.code = ErrorCode::kHostile,
                          .what = "The pickle names a function that would run a program or reach "
                                  "the system when loaded by Python.",
                          .file = path,
                          .entry = "global " + quote(hostile.name),
                          .found = hostile.called ? kCalledGlobal : "its name alone",
                          .safe = "nothing was executed: this program never runs a pickle",
                          .next = "do not load this file with torch; find out who wrote it"});
  const auto bad = [&] {
    fail(ErrorCode::kCorrupt, path, "A persistent id is not that of a storage.", "data.pkl");
  };
  std::map<int64_t, int64_t> sizes;
  for (NodeId node = 0; node < pickle.size(); ++node) {
    if (pickle.kind(node) != Kind::kPersistent) continue;
    const NodeId id = pickle.persistent_id(node);
    if (pickle.kind(id) != Kind::kTuple || pickle.items(id).size() != 5) bad();
    const std::vector<NodeId>& parts = pickle.items(id);
    if (pickle.kind(parts[1]) != Kind::kGlobal || pickle.kind(parts[2]) != Kind::kString ||
        pickle.kind(parts[4]) != Kind::kInt)
      bad();
    const std::string& text = pickle.text(parts[2]);
    int64_t key = -1;
    const auto [stop, failure] = std::from_chars(text.data(), text.data() + text.size(), key);
    const int64_t item = item_bytes_of(pickle.attribute(parts[1]));
    const int64_t count = pickle.integer_value(parts[4]);
    if (failure != std::errc() || stop != text.data() + text.size() || text.size() > 9 ||
        item == 0 || count < 0 || count > kMostStorageBytes / 16)
      bad();
    if (const auto [known, fresh] = sizes.emplace(key, count * item);
        !fresh && known->second != count * item)
      bad();
  }
  std::vector<int64_t> result;
  for (const auto& [key, size] : sizes) {
    if (key != static_cast<int64_t>(result.size())) bad();
    result.push_back(size);
  }
  return result;
}

TornFile read_torn_file(const ReadableFile& file) { return Walker(file).run(); }

}  // namespace isoshard::checkpoint
