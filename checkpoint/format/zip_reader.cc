// The reader's half of checkpoint/format/zip.h. Nothing is allocated from a declared size before
// it is compared with the file's.
#include <algorithm>
#include <string_view>
#include <unordered_set>

#include "checkpoint/format/zip.h"
#include "checkpoint/format/zip_fields.h"
#include "core/error.h"
#include "core/mutant.h"
#include "core/utf8.h"

namespace isoshard::checkpoint {
namespace {

using namespace zip;

constexpr int64_t kRecordLimit = 5'000'000;
constexpr int64_t kSmallBytes = 4096, kWindowBytes = 1 << 16, kEdgeBytes = 512;
constexpr int64_t kDirectoryLimit = 1ll << 30;  // a hole can be as large as a file may be

struct End {
  int64_t directory_offset = 0;
  int64_t directory_bytes = 0;
  int64_t records = 0;
  bool zip64 = false;
};

class Reader {
 public:
  explicit Reader(const ReadableFile& file) : file_(file), size_(file.size_bytes()) {}

  ZipIndex run() {
    const End end = read_end();
    read_directory(end);
    check_tiling(end);
    check_names();
    return std::move(index_);
  }

 private:
  struct Central {
    uint16_t flags = 0, name_bytes = 0;
    uint64_t fixed = 0;  // method, time and date, as in the local header
  };

  [[noreturn]] void corrupt(const std::string& what, const std::string& entry = "",
                            const std::string& expected = "", const std::string& found = "",
                            ErrorCode code = ErrorCode::kCorrupt) const {
    throw Error(
        ErrorInfo{.code = code,
                  .what = what,
                  .file = file_.path(),
                  .entry = entry,
                  .expected = expected,
                  .found = found,
                  .next = "restore this file from another copy, or use an older checkpoint"});
  }
  void equal(uint64_t found, uint64_t expected, const char* field, const std::string& entry) const {
    if (found == expected) return;
    corrupt(std::string("A zip header field is wrong: ") + field + ".", entry,
            std::to_string(expected), std::to_string(found));
  }
  // Valid until the next call. `ahead`: so many bytes are fetched with them, for those to come.
  std::string_view bytes_at(int64_t offset, int64_t count, int64_t ahead = 0) {
    if (offset < 0 || count < 0 || offset > size_ - count) {
      corrupt("A zip record points outside the file.", "",
              "within " + std::to_string(size_) + " bytes",
              std::to_string(offset) + " + " + std::to_string(count));
    }
    const auto window_bytes = static_cast<int64_t>(window_.size());
    if (offset < window_offset_ || offset + count > window_offset_ + window_bytes) {
      window_.resize(static_cast<size_t>(std::min(std::max(count, ahead), size_ - offset)));
      window_offset_ = offset;
      file_.read_at(offset, std::as_writable_bytes(std::span(window_)));
    }
    return std::string_view(window_).substr(static_cast<size_t>(offset - window_offset_),
                                            static_cast<size_t>(count));
  }
  // Small records are fetched many at a time; of large ones only what stands between two payloads.
  int64_t ahead_of(size_t number) const {
    if (number >= index_.records.size()) return kEdgeBytes;
    return index_.records[number].size_bytes < kSmallBytes ? kWindowBytes : kEdgeBytes;
  }

  End read_end();
  void read_directory(const End& end);
  void read_central(std::string_view directory, size_t* cursor);
  std::string split_name(std::string_view path);
  void check_tiling(const End& end);
  int64_t check_local(size_t number);
  bool is_path(std::string_view path, const std::string& name) const;
  void check_extra(const ZipRecord& record, std::string_view extra, bool* zip64) const;
  void check_names() const;
  void refuse_unsafe(const std::string& name, std::string_view path) const;

  const ReadableFile& file_;
  int64_t size_;
  ZipIndex index_;
  std::vector<Central> centrals_;
  std::string window_;
  int64_t window_offset_ = 0;
};

End Reader::read_end() {
  if (size_ < kEndBytes) {
    corrupt("The file is too short to be a torch checkpoint.", "", "at least 22 bytes",
            std::to_string(size_) + " bytes", ErrorCode::kIncomplete);
  }
  const std::string tail(bytes_at(size_ - kEndBytes, kEndBytes));
  if (load(tail, 0, 4) != kEndSignature) {
    corrupt(
        "The file does not end as a zip archive does: it was cut short, extended or overwritten.",
        "end record", "", "", ErrorCode::kIncomplete);
  }
  equal(load(tail, 4, 4), 0, "disk numbers", "end record");
  equal(load(tail, 20, 2), 0, "comment length", "end record");
  equal(load(tail, 8, 2), load(tail, 10, 2), "number of records", "end record");
  End end{static_cast<int64_t>(load(tail, 16, 4)), static_cast<int64_t>(load(tail, 12, 4)),
          static_cast<int64_t>(load(tail, 10, 2)), false};
  int64_t directory_end = size_ - kEndBytes;
  const bool room = size_ >= kEndBytes + kLocatorBytes + kEnd64Bytes;
  const std::string locator(room ? bytes_at(directory_end - kLocatorBytes, kLocatorBytes)
                                 : std::string_view());
  if (room && load(locator, 0, 4) == kLocatorSignature) {
    end.zip64 = true;
    directory_end -= kLocatorBytes + kEnd64Bytes;
    equal(load(locator, 4, 4), 0, "disk number", "zip64 locator");
    equal(load(locator, 8, 8), static_cast<uint64_t>(directory_end), "offset", "zip64 locator");
    equal(load(locator, 16, 4), 1, "number of disks", "zip64 locator");
    const std::string end64(bytes_at(directory_end, kEnd64Bytes));
    equal(load(end64, 0, 4), kEnd64Signature, "signature", "zip64 end record");
    equal(load(end64, 4, 8), kEnd64Bytes - 12, "size", "zip64 end record");
    equal(load(end64, 12, 2), 0x031E, "version made by", "zip64 end record");
    equal(load(end64, 14, 2), 0x002D, "version needed", "zip64 end record");
    equal(load(end64, 16, 8), 0, "disk numbers", "zip64 end record");
    const uint64_t records = load(end64, 24, 8), bytes = load(end64, 40, 8),
                   at = load(end64, 48, 8);
    equal(load(end64, 32, 8), records, "number of records", "zip64 end record");
    equal(mutant("zip_zip64_disagrees") ? std::min<uint64_t>(records, 0xFFFF)
                                        : static_cast<uint64_t>(end.records),
          std::min<uint64_t>(records, 0xFFFF), "number of records", "end record");
    equal(static_cast<uint64_t>(end.directory_bytes), std::min<uint64_t>(bytes, kMax32),
          "directory size", "end record");
    equal(static_cast<uint64_t>(end.directory_offset), std::min<uint64_t>(at, kMax32),
          "directory offset", "end record");
    if (records > static_cast<uint64_t>(kRecordLimit)) {
      corrupt("A limit against resource bombs was reached: zip records.", "zip64 end record",
              "at most 5000000", std::to_string(records), ErrorCode::kLimit);
    }
    end.records = static_cast<int64_t>(records);
    end.directory_bytes = static_cast<int64_t>(std::min<uint64_t>(bytes, 1ull << 62));
    end.directory_offset = static_cast<int64_t>(std::min<uint64_t>(at, 1ull << 62));
  }
  index_.torch_dialect = end.zip64;
  if (end.directory_offset > directory_end ||
      end.directory_offset + end.directory_bytes != directory_end) {
    corrupt("The zip directory does not end where the end records begin.", "end record",
            std::to_string(directory_end),
            std::to_string(end.directory_offset) + " + " + std::to_string(end.directory_bytes));
  }
  return end;
}

void Reader::read_directory(const End& end) {
  if (end.directory_bytes < end.records * kCentralBytes) {
    corrupt("The zip directory is too small for its records.");
  }
  if (end.directory_bytes > kDirectoryLimit) {
    corrupt("A limit against resource bombs was reached: bytes of the zip directory.", "end record",
            "at most " + std::to_string(kDirectoryLimit), std::to_string(end.directory_bytes),
            ErrorCode::kLimit);
  }
  const std::string_view directory = bytes_at(end.directory_offset, end.directory_bytes);
  index_.records.reserve(static_cast<size_t>(end.records));
  centrals_.reserve(static_cast<size_t>(end.records));
  size_t cursor = 0;
  for (int64_t i = 0; i < end.records; ++i) read_central(directory, &cursor);
  if (cursor != directory.size() && !mutant("zip_directory_tail"))
    corrupt("The zip directory holds bytes beyond its last record.");
}

void Reader::read_central(std::string_view directory, size_t* cursor) {
  const size_t at = *cursor;
  const auto entry = [&] { return "directory record " + std::to_string(index_.records.size()); };
  const auto same = [&](uint64_t found, uint64_t expected, const char* field) {
    if (found != expected) equal(found, expected, field, entry());
  };
  const auto room = [&](uint64_t bytes) {
    if (directory.size() - *cursor < bytes)
      corrupt("The zip directory ends inside a record.", entry());
  };
  room(kCentralBytes);
  same(load(directory, at, 4), kCentralSignature, "signature");
  Central central;
  central.flags = static_cast<uint16_t>(load(directory, at + 8, 2));
  central.name_bytes = static_cast<uint16_t>(load(directory, at + 28, 2));
  central.fixed = load(directory, at + 10, 6);
  const uint64_t extra_bytes = load(directory, at + 30, 2);
  same(mutant("zip_compressed_allowed") ? 0 : load(directory, at + 10, 2), 0,
       "compression method (records must be stored)");
  same(load(directory, at + 32, 4), 0, "comment length and disk");
  if ((central.flags & ~kTorchFlags) != 0) corrupt("A zip record has unknown flags.", entry());
  if (index_.torch_dialect) {
    same(load(directory, at + 4, 4), 0, "versions");
    same(load(directory, at + 12, 4), 0, "time and date");
    same(load(directory, at + 36, 6), 0, "attributes");
  }
  *cursor += kCentralBytes;
  room(central.name_bytes + extra_bytes);
  ZipRecord record;
  record.crc32 = static_cast<uint32_t>(load(directory, at + 16, 4));
  record.name = split_name(directory.substr(*cursor, central.name_bytes));
  const std::string_view extra = directory.substr(*cursor + central.name_bytes, extra_bytes);
  *cursor += central.name_bytes + extra_bytes;
  // Sizes and offset: the 32-bit fields, or the zip64 field for those that are all ones.
  uint64_t packed = load(directory, at + 20, 4), size = load(directory, at + 24, 4);
  uint64_t offset = load(directory, at + 42, 4);
  size_t wide = 4;
  const auto widen = [&](uint64_t* value) {
    if (*value != static_cast<uint64_t>(kMax32)) return;
    if (extra.size() < wide + 8) corrupt("A zip64 field is too short.", entry());
    *value = load(extra, wide, 8);
    wide += 8;
  };
  widen(&size);
  widen(&packed);
  widen(&offset);
  same(packed, size, "compressed size (records must be stored)");
  if (size > static_cast<uint64_t>(size_) || offset > static_cast<uint64_t>(size_)) {
    corrupt("A zip record points outside the file.", quote(record.name));
  }
  record.size_bytes = static_cast<int64_t>(size);
  record.header_offset = static_cast<int64_t>(offset);
  if (index_.torch_dialect) same(central.flags, torch_flags(record.size_bytes), "flags");
  if (extra != central_zip64(record.size_bytes, record.header_offset)) {
    corrupt("A zip record's extra field is not what its sizes call for.", quote(record.name));
  }
  index_.records.push_back(std::move(record));
  centrals_.push_back(central);
}

// Records must lie one behind another from byte 0 to the directory: no gap, no overlap.
void Reader::check_tiling(const End& end) {
  int64_t cursor = 0;
  for (size_t i = 0; i < index_.records.size(); ++i) {
    const ZipRecord& record = index_.records[i];
    if (record.header_offset != cursor && !mutant("zip_gap_allowed")) {
      corrupt("Zip records overlap or leave a gap.", quote(record.name), std::to_string(cursor),
              std::to_string(record.header_offset));
    }
    cursor = check_local(i);
  }
  if (cursor != end.directory_offset && !mutant("zip_bytes_before_directory")) {
    corrupt("Bytes lie between the last zip record and the directory.", "", std::to_string(cursor),
            std::to_string(end.directory_offset));
  }
}

// Returns the offset behind the record.
int64_t Reader::check_local(size_t number) {
  ZipRecord* record = &index_.records[number];
  const Central& central = centrals_[number];
  const auto same = [&](uint64_t found, uint64_t expected, const char* field) {
    if (found != expected && !mutant("zip_local_header_ignored"))
      equal(found, expected, field, quote(record->name));
  };
  const bool deferred = (central.flags & 0x8) != 0;
  const auto size = static_cast<uint64_t>(record->size_bytes);
  const uint64_t size32 = std::min<uint64_t>(size, kMax32);
  const std::string_view header =
      bytes_at(record->header_offset, kLocalBytes + central.name_bytes, ahead_of(number));
  same(load(header, 0, 4), kLocalSignature, "signature");
  if (index_.torch_dialect) same(load(header, 4, 2), 0, "version needed");
  same(load(header, 6, 2), central.flags, "flags");
  same(load(header, 8, 6), central.fixed, "method, time and date");
  same(load(header, 14, 4), deferred ? 0 : record->crc32, "CRC");
  same(load(header, 18, 4), deferred ? 0 : size32, "compressed size");
  same(load(header, 22, 4), deferred ? 0 : size32, "size");
  same(load(header, 26, 2), central.name_bytes, "name length");
  const auto extra_bytes = static_cast<int64_t>(load(header, 28, 2));
  if (!is_path(header.substr(kLocalBytes), record->name)) {
    corrupt("A record's name differs between its header and the directory.", quote(record->name));
  }
  record->data_offset = record->header_offset + kLocalBytes + central.name_bytes + extra_bytes;
  bool zip64 = false;
  check_extra(*record, bytes_at(record->data_offset - extra_bytes, extra_bytes), &zip64);
  const int64_t end = record->data_offset + record->size_bytes;
  if (!deferred) return end;
  const size_t width = zip64 ? 8 : 4;
  const std::string_view descriptor =
      bytes_at(end, static_cast<int64_t>(8 + 2 * width), ahead_of(number + 1));
  same(load(descriptor, 0, 4), kDescriptorSignature, "descriptor signature");
  same(load(descriptor, 4, 4), record->crc32, "CRC in the descriptor");
  same(load(descriptor, 8, width), size, "compressed size in the descriptor");
  same(load(descriptor, 8 + width, width), size, "size in the descriptor");
  return end + static_cast<int64_t>(descriptor.size());
}

bool Reader::is_path(std::string_view path, const std::string& name) const {
  const size_t folder = index_.prefix.size();
  return path.size() == folder + 1 + name.size() && path.starts_with(index_.prefix) &&
         path[folder] == '/' && path.substr(folder + 1) == name;
}

void Reader::check_extra(const ZipRecord& record, std::string_view extra, bool* zip64) const {
  const std::string wide = local_zip64(record.size_bytes, record.header_offset);
  *zip64 = !wide.empty();
  const int64_t before = record.data_offset - static_cast<int64_t>(extra.size() - wide.size());
  if (mutant("zip_extra_unchecked")) return;
  if (extra.starts_with(wide) && is_fill_extra(extra.substr(wide.size()), before)) return;
  if (!index_.torch_dialect &&
      (extra.empty() || (extra.size() >= 4 && load(extra, 0, 2) == kFillExtra)))
    return;
  corrupt("A record's extra field is not the alignment fill that torch writes.",
          quote(record.name));
}

void Reader::refuse_unsafe(const std::string& name, std::string_view path) const {
  std::string why = why_unsafe_name(name);
  if (name.find('\\') != std::string::npos && !mutant("zip_backslash_allowed"))
    why = "the name has a backslash";
  if (why.empty() || mutant("zip_unsafe_name")) return;
  corrupt("A zip record has an unsafe name: " + why + ".", quote(std::string(path)), "", "",
          ErrorCode::kHostile);
}

// The name below the archive's folder, which is the same for all records.
std::string Reader::split_name(std::string_view path) {
  const size_t slash = path.find('/');
  const std::string_view folder = path.substr(0, slash);
  if (index_.records.empty() || folder != index_.prefix) {
    refuse_unsafe(std::string(path), path);
    if (slash == std::string_view::npos)
      corrupt("A zip record lies outside the archive's folder.", quote(std::string(path)));
    if (!index_.records.empty() && !mutant("zip_other_folder")) {
      corrupt("A zip record lies in another folder than the first.", quote(std::string(path)),
              index_.prefix, std::string(folder));
    }
    index_.prefix = folder;
  }
  std::string name(slash == std::string_view::npos ? path : path.substr(slash + 1));
  refuse_unsafe(name, path);
  return name;
}

void Reader::check_names() const {
  std::unordered_set<std::string_view> seen;
  seen.reserve(index_.records.size());
  for (const ZipRecord& record : index_.records) {
    if (!seen.insert(record.name).second && !mutant("zip_duplicates_allowed"))
      corrupt("Two zip records have the same name.", quote(record.name), "", "",
              ErrorCode::kHostile);
  }
}

}  // namespace

ZipIndex read_zip_index(const ReadableFile& file) { return Reader(file).run(); }

}  // namespace isoshard::checkpoint
