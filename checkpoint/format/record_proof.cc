// See record_proof.h.
#include "checkpoint/format/record_proof.h"

#include <algorithm>
#include <vector>

#include "checkpoint/cancel.h"
#include "checkpoint/format/crc.h"
#include "core/polynomial.h"

namespace isoshard::checkpoint {
namespace {

constexpr int64_t kStepBytes = 1 << 20;

}  // namespace

bool is_bad_sector(const ErrorInfo& info) {
  return info.code == ErrorCode::kUnreadable && info.found.ends_with(", EIO");
}

std::string one_line(const ErrorInfo& info) {
  std::string text = info.what;
  if (!info.entry.empty()) text += " " + info.entry;
  if (!info.expected.empty()) text += ", expected " + info.expected;
  if (!info.found.empty()) text += ", found " + info.found;
  return text;
}

std::string why_unproven(const ReadableFile& file, const ZipRecord& record) {
  RawCrcs crcs;
  std::vector<std::byte> bytes;
  try {
    for (int64_t at = 0; at < record.size_bytes; at += kStepBytes) {
      throw_if_cancelled();
      bytes.resize(static_cast<size_t>(std::min(kStepBytes, record.size_bytes - at)));
      file.read_at(record.data_offset + at, bytes);
      crcs.update(bytes);
    }
  } catch (const Error& error) {
    const ErrorCode code = error.info().code;
    if (code != ErrorCode::kCorrupt && !is_bad_sector(error.info())) throw;
    return "record " + record.name + " cannot be read: " + one_line(error.info());
  }
  const auto found =
      static_cast<uint32_t>(crc32_polynomial().finish(crcs.crc32, record.size_bytes));
  if (found == record.crc32) return "";
  return "CRC wrong at record " + record.name + ": " + hex16(record.crc32).substr(8) +
         " is recorded, its bytes give " + hex16(found).substr(8);
}

}  // namespace isoshard::checkpoint
