// Numbers of the zip format (APPNOTE.TXT 6.3.10) and little-endian access with checked lengths;
// shared by the reader and the writer of checkpoint/format/zip.h.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "core/check.h"

namespace isoshard::checkpoint::zip {

constexpr uint32_t kLocalSignature = 0x04034b50, kDescriptorSignature = 0x08074b50,
                   kCentralSignature = 0x02014b50, kEnd64Signature = 0x06064b50,
                   kLocatorSignature = 0x07064b50, kEndSignature = 0x06054b50;
constexpr int64_t kLocalBytes = 30, kCentralBytes = 46, kEnd64Bytes = 56, kLocatorBytes = 20,
                  kEndBytes = 22;
constexpr uint16_t kTorchFlags = 0x0808;  // data descriptor, UTF-8 names
constexpr uint16_t kEmptyFlags = 0x0800;  // an empty record has no descriptor
constexpr uint16_t kZip64Extra = 0x0001;
constexpr uint16_t kFillExtra = 0x4246;  // "FB"
constexpr int64_t kAlignment = 64;
constexpr int64_t kMax32 = 0xFFFFFFFFll;  // sizes and offsets from here on need zip64

inline uint64_t load(std::string_view bytes, size_t at, size_t count) {
  CHECK(at + count <= bytes.size(), "zip field beyond its record");
  uint64_t value = 0;
  for (size_t i = 0; i < count; ++i) {
    value |= static_cast<uint64_t>(static_cast<unsigned char>(bytes[at + i])) << (8 * i);
  }
  return value;
}

inline void append(std::string* bytes, uint64_t value, int count) {
  for (int i = 0; i < count; ++i, value >>= 8) *bytes += static_cast<char>(value & 0xFF);
}

inline uint16_t torch_flags(int64_t size_bytes) {
  return size_bytes == 0 ? kEmptyFlags : kTorchFlags;
}

// The zip64 extra field of a local header as torch's miniz writes it: sizes if the record is large,
// then its own header offset if that is large; empty otherwise.
inline std::string local_zip64(int64_t size_bytes, int64_t header_offset) {
  const bool large = size_bytes >= kMax32, far = header_offset >= kMax32;
  std::string extra;
  if (!large && !far) return extra;
  append(&extra, kZip64Extra, 2);
  append(&extra, (large ? 16u : 0u) + (far ? 8u : 0u), 2);
  if (large) append(&extra, static_cast<uint64_t>(size_bytes), 8);
  if (large) append(&extra, 0, 8);
  if (far) append(&extra, static_cast<uint64_t>(header_offset), 8);
  return extra;
}

// The same field in the central directory, where both sizes are real.
inline std::string central_zip64(int64_t size_bytes, int64_t header_offset) {
  const bool large = size_bytes >= kMax32, far = header_offset >= kMax32;
  std::string extra;
  if (!large && !far) return extra;
  append(&extra, kZip64Extra, 2);
  append(&extra, (large ? 16u : 0u) + (far ? 8u : 0u), 2);
  if (large) append(&extra, static_cast<uint64_t>(size_bytes), 8);
  if (large) append(&extra, static_cast<uint64_t>(size_bytes), 8);
  if (far) append(&extra, static_cast<uint64_t>(header_offset), 8);
  return extra;
}

// The "FB" field that puts the data at the next multiple of 64.
inline std::string fill_extra(int64_t offset_before) {
  const int64_t start = offset_before + 4;
  const int64_t fill = (kAlignment - start % kAlignment) % kAlignment;
  std::string extra;
  append(&extra, kFillExtra, 2);
  append(&extra, static_cast<uint64_t>(fill), 2);
  return extra + std::string(static_cast<size_t>(fill), 'Z');
}

inline bool is_fill_extra(std::string_view extra, int64_t offset_before) {
  const int64_t start = offset_before + 4;
  const auto fill = static_cast<size_t>((kAlignment - start % kAlignment) % kAlignment);
  return extra.size() == 4 + fill && load(extra, 0, 2) == kFillExtra && load(extra, 2, 2) == fill &&
         extra.find_first_not_of('Z', 4) == std::string_view::npos;
}

}  // namespace isoshard::checkpoint::zip
