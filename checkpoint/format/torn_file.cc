// See torn_file.h: data.pkl and the storages that it names; torn_chain.h proves their records.
#include "checkpoint/format/torn_file.h"

#include <algorithm>
#include <charconv>
#include <map>
#include <string_view>

#include "checkpoint/cancel.h"
#include "checkpoint/format/crc.h"
#include "checkpoint/format/pickle_reader.h"
#include "checkpoint/format/record_proof.h"
#include "checkpoint/format/torch_file.h"
#include "checkpoint/format/torn_chain.h"
#include "checkpoint/format/zip_fields.h"
#include "core/error.h"
#include "core/utf8.h"

namespace isoshard::checkpoint {
namespace {

using namespace zip;

constexpr int64_t kWindowBytes = 1 << 20, kLongestName = 600;
constexpr int64_t kMostStorageBytes = int64_t{1} << 58;
constexpr int64_t kMostFileBytes = int64_t{1} << 60;  // what storages may add up to
constexpr std::string_view kDescriptorMark("PK\7\10", 4);

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
    TornChain(file_, &result_).prove();
    return std::move(result_);
  }

 private:
  // Up to the file's end, or near to what the disk has lost.
  std::string bytes_at(int64_t offset, int64_t most) const {
    for (most = std::clamp<int64_t>(size_ - offset, 0, most); most > 0; most /= 2) {
      try {
        std::string bytes(static_cast<size_t>(most), '\0');
        file_.read_at(offset, std::as_writable_bytes(std::span(bytes)));
        return bytes;
      } catch (const Error& error) {
        if (!is_bad_sector(error.info())) throw;
      }
    }
    return "";
  }
  std::optional<LocalHeader> header_at(int64_t offset) const;
  void read_pickle_record();
  bool is_descriptor(std::string_view bytes, int64_t size_bytes) const;

  const ReadableFile& file_;
  int64_t size_;
  TornFile result_;
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

bool Walker::is_descriptor(std::string_view bytes, int64_t size_bytes) const {
  if (bytes.size() < 16 || !bytes.starts_with(kDescriptorMark)) return false;
  const auto size = static_cast<uint64_t>(size_bytes);
  return load(bytes, 8, 4) == size && load(bytes, 12, 4) == size;
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
    fail(ErrorCode::kCorrupt, file_.path(), "A zip record has an unsafe name: " + why + ".",
         quote(header->path));
  result_.prefix = header->path.substr(0, slash);
  const int64_t most = PickleLimits{}.stream_bytes + 24;
  std::string bytes;
  size_t from = 0;
  for (;;) {
    throw_if_cancelled();
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
      if (!is_descriptor(std::string_view(bytes).substr(at), static_cast<int64_t>(at))) continue;
      const uint32_t crc = crc32_of(std::as_bytes(std::span(bytes.data(), at)));
      if (crc == load(bytes, at + 4, 4)) {
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

}  // namespace

std::vector<int64_t> storage_sizes(const std::string& bytes, const std::string& path) {
  const Pickle pickle = read_pickle(bytes, path);
  refuse_hostile(pickle, path);
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
    const int64_t item = storage_item_bytes(pickle.attribute(parts[1]));
    const int64_t count = pickle.integer_value(parts[4]);
    if (failure != std::errc() || stop != text.data() + text.size() || text.size() > 9 ||
        item == 0 || count < 0 || count > kMostStorageBytes / 16)
      bad();
    if (const auto [known, fresh] = sizes.emplace(key, count * item);
        !fresh && known->second != count * item)
      bad();
  }
  std::vector<int64_t> result;
  int64_t sum = 0;
  for (const auto& [key, size] : sizes) {
    if (key != static_cast<int64_t>(result.size())) bad();
    if (size > kMostFileBytes - sum)
      fail(ErrorCode::kLimit, path, "The storages are larger than a file can be.",
           "data/" + std::to_string(key), std::to_string(size) + " bytes");
    sum += size;
    result.push_back(size);
  }
  return result;
}

TornFile read_torn_file(const ReadableFile& file) { return Walker(file).run(); }

}  // namespace isoshard::checkpoint
