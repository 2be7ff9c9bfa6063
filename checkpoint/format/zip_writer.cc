// The writer's half of checkpoint/format/zip.h: all offsets follow from names and sizes.
#include <algorithm>

#include "checkpoint/format/zip.h"
#include "checkpoint/format/zip_fields.h"
#include "core/mutant.h"

namespace isoshard::checkpoint {

using namespace zip;

int ZipLayout::add(const std::string& path, int64_t size_bytes) {
  ZipRecord record;
  record.name = path.substr(path.find('/') + 1);
  paths_.push_back(path);
  record.header_offset = cursor_;
  record.size_bytes = size_bytes;
  records_.push_back(record);
  const int number = count() - 1;
  ZipRecord& added = records_.back();
  added.data_offset = cursor_ + static_cast<int64_t>(header(number).size());
  cursor_ = added.data_offset + size_bytes + static_cast<int64_t>(descriptor(number, 0).size());
  return number;
}

std::string ZipLayout::header(int number) const {
  const ZipRecord& r = record(number);
  const std::string zip64 = local_zip64(r.size_bytes, r.header_offset);
  const int64_t before = r.header_offset + kLocalBytes + static_cast<int64_t>(path(number).size()) +
                         static_cast<int64_t>(zip64.size());
  const std::string extra = zip64 + fill_extra(before);
  std::string bytes;
  append(&bytes, kLocalSignature, 4);
  append(&bytes, 0, 2);  // version needed
  append(&bytes, mutant("zip_empty_with_descriptor") ? kTorchFlags : torch_flags(r.size_bytes), 2);
  append(&bytes, 0, 2);   // stored
  append(&bytes, 0, 4);   // time and date
  append(&bytes, 0, 12);  // CRC and sizes stand in the descriptor
  append(&bytes, path(number).size(), 2);
  append(&bytes, extra.size(), 2);
  return bytes + path(number) + extra;
}

std::string ZipLayout::descriptor(int number, uint32_t crc32) const {
  const ZipRecord& r = record(number);
  const int width =
      mutant("zip_sizes_narrow") || local_zip64(r.size_bytes, r.header_offset).empty() ? 4 : 8;
  std::string bytes;
  if (r.size_bytes == 0) return bytes;
  append(&bytes, kDescriptorSignature, 4);
  append(&bytes, mutant("zip_crc_not_written") ? 0 : crc32, 4);
  append(&bytes, static_cast<uint64_t>(r.size_bytes), width);
  append(&bytes, static_cast<uint64_t>(r.size_bytes), width);
  return bytes;
}

std::string ZipLayout::directory(const std::vector<uint32_t>& crcs) const {
  CHECK(crcs.size() == records_.size(), "one CRC a record");
  std::string bytes;
  for (size_t i = 0; i < records_.size(); ++i) {
    const ZipRecord& r = records_[i];
    const std::string extra = central_zip64(r.size_bytes, r.header_offset);
    append(&bytes, kCentralSignature, 4);
    append(&bytes, 0, 4);  // versions
    append(&bytes, torch_flags(r.size_bytes), 2);
    append(&bytes, 0, 6);  // stored, time, date
    append(&bytes, crcs[i], 4);
    append(&bytes, static_cast<uint64_t>(std::min(r.size_bytes, kMax32)), 4);
    append(&bytes, static_cast<uint64_t>(std::min(r.size_bytes, kMax32)), 4);
    append(&bytes, paths_[i].size(), 2);
    append(&bytes, extra.size(), 2);
    append(&bytes, 0, 10);  // comment, disk, attributes
    append(&bytes, static_cast<uint64_t>(std::min(r.header_offset, kMax32)), 4);
    bytes += paths_[i] + extra;
  }
  const uint64_t size = bytes.size(), records = records_.size();
  const auto offset = static_cast<uint64_t>(cursor_);
  append(&bytes, kEnd64Signature, 4);
  append(&bytes, kEnd64Bytes - 12, 8);
  append(&bytes, 0x031E, 2);  // what torch's miniz says it was made by
  append(&bytes, 0x002D, 2);
  append(&bytes, 0, 8);
  append(&bytes, records, 8);
  append(&bytes, records, 8);
  append(&bytes, size, 8);
  append(&bytes, offset, 8);
  append(&bytes, kLocatorSignature, 4);
  append(&bytes, 0, 4);
  append(&bytes, offset + size, 8);
  append(&bytes, 1, 4);
  append(&bytes, kEndSignature, 4);
  append(&bytes, 0, 4);
  append(&bytes, mutant("zip_old_count_wraps") ? records : std::min<uint64_t>(records, 0xFFFF), 2);
  append(&bytes, std::min<uint64_t>(records, 0xFFFF), 2);
  append(&bytes, std::min<uint64_t>(size, kMax32), 4);
  append(&bytes, std::min<uint64_t>(offset, kMax32), 4);
  append(&bytes, 0, 2);
  return bytes;
}

}  // namespace isoshard::checkpoint
