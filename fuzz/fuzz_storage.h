// The bytes of a fuzzer as what the readers take: a file, a folder in memory, or a row of fields.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "checkpoint/memory_storage.h"
#include "core/error.h"
#include "core/storage.h"

namespace isoshard::fuzz {

using Bytes = std::span<const std::byte>;

inline std::string text_of(Bytes bytes) {
  return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

inline Bytes bytes_of(const std::string& text) { return std::as_bytes(std::span(text)); }

// A file that is these bytes, which must outlive it.
class BytesFile final : public ReadableFile {
 public:
  explicit BytesFile(Bytes bytes) : bytes_(bytes) {}

  const std::string& path() const override { return path_; }
  int64_t size_bytes() const override { return static_cast<int64_t>(bytes_.size()); }
  void read_at(int64_t offset, std::span<std::byte> target) const override {
    const auto count = static_cast<int64_t>(target.size());
    if (offset < 0 || count > size_bytes() - offset)
      throw Error(ErrorCode::kCorrupt, "The file ends before the bytes it must hold.");
    std::ranges::copy(bytes_.subspan(static_cast<size_t>(offset), target.size()), target.begin());
  }
  int64_t next_data(int64_t offset) const override { return std::min(offset, size_bytes()); }
  int64_t next_hole(int64_t) const override { return size_bytes(); }

 private:
  std::string path_ = "fuzzed";
  Bytes bytes_;
};

// Takes fields off the front of the bytes; what is not there any more is 0 or shorter.
class Fields {
 public:
  explicit Fields(Bytes bytes) : rest_(bytes) {}

  bool empty() const { return rest_.empty(); }
  Bytes rest() const { return rest_; }
  // Little-endian, of `count_bytes` bytes.
  size_t number(size_t count_bytes) {
    size_t value = 0, shift = 0;
    for (const std::byte byte : take(count_bytes)) {
      value |= std::to_integer<size_t>(byte) << shift;
      shift += 8;
    }
    return value;
  }
  std::string text(size_t count_bytes) { return text_of(take(count_bytes)); }

 private:
  Bytes take(size_t count_bytes) {
    const Bytes taken = rest_.first(std::min(count_bytes, rest_.size()));
    rest_ = rest_.subspan(taken.size());
    return taken;
  }

  Bytes rest_;
};

// Writes a file and the folders above it. False where the storage refuses the path.
inline bool put(Storage& storage, const std::string& path, const std::string& text) {
  try {
    storage.make_directories(path.substr(0, path.rfind('/')));
    const std::unique_ptr<WritableFile> file = storage.create(path);
    file->write_at(0, bytes_of(text));
    file->close();
    return true;
  } catch (const Error&) {
    return false;
  }
}

}  // namespace isoshard::fuzz
