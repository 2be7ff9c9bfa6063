// See compared_file.h.
#include "reshard/compared_file.h"

#include <algorithm>
#include <cstring>

namespace isoshard::reshard {
namespace {

constexpr int64_t kStepBytes = 1 << 20;
constexpr int64_t kHoleBytes = 4096;  // shorter runs are not asked for holes

bool all_zero(std::span<const std::byte> bytes) {
  return std::ranges::all_of(bytes, [](std::byte byte) { return byte == std::byte{0}; });
}

int64_t count_different(std::span<const std::byte> a, std::span<const std::byte> b) {
  int64_t count = 0;
  for (size_t i = 0; i < a.size(); ++i) count += a[i] != b[i];
  return count;
}

}  // namespace

ComparedFile::Found ComparedFile::put(int64_t offset, std::span<const std::byte> bytes,
                                      std::vector<std::byte>* buffer) {
  Found found;
  const auto size = static_cast<int64_t>(bytes.size());
  if (size == 0) return found;
  const bool empty =
      there_ == nullptr || (size >= kHoleBytes && there_->next_data(offset) >= offset + size);
  if (!empty) {
    buffer->resize(std::max(buffer->size(), bytes.size()));
    const std::span<std::byte> stands = std::span(*buffer).first(bytes.size());
    there_->read_at(offset, stands);
    if (std::memcmp(stands.data(), bytes.data(), bytes.size()) == 0) {
      found.equal = size;
      return found;
    }
    if (!all_zero(stands)) found.wrong = count_different(stands, bytes);
  }
  file_->write_at(offset, bytes);
  found.written = size;
  return found;
}

ComparedFile::Found ComparedFile::put_zeros(int64_t offset, int64_t size_bytes,
                                            std::vector<std::byte>* buffer) {
  Found found;
  if (there_ == nullptr) return found;
  const int64_t end = offset + size_bytes;
  found.equal = size_bytes;
  for (int64_t at = there_->next_data(offset); at < end;) {
    const int64_t size = std::min(kStepBytes, end - at);
    buffer->resize(std::max(buffer->size(), static_cast<size_t>(size)));
    const std::span<std::byte> stands = std::span(*buffer).first(static_cast<size_t>(size));
    there_->read_at(at, stands);
    if (!all_zero(stands)) {
      found.wrong += static_cast<int64_t>(
          std::ranges::count_if(stands, [](std::byte byte) { return byte != std::byte{0}; }));
      std::ranges::fill(stands, std::byte{0});
      file_->write_at(at, stands);
      found.written += size;
      found.equal -= size;
    }
    at = there_->next_data(at + size);
  }
  return found;
}

}  // namespace isoshard::reshard
