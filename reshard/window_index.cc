// See window_index.h.
#include "reshard/window_index.h"

#include <algorithm>
#include <cstring>

#include "checkpoint/cancel.h"

namespace isoshard::reshard {
namespace {

constexpr size_t kMaxPlaces = 64;
constexpr int64_t kSparse = 2048;  // elements; windows further apart are read one by one

uint64_t hash_of(std::span<const std::byte> bytes) {
  uint64_t hash = 0xCBF29CE484222325u;
  for (size_t at = 0; at < bytes.size(); at += sizeof(uint64_t)) {
    uint64_t word = 0;
    std::memcpy(&word, bytes.data() + at, std::min(sizeof word, bytes.size() - at));
    hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 29;
  }
  return hash;
}

}  // namespace

bool is_constant(std::span<const std::byte> elements, int64_t item) {
  const auto step = static_cast<size_t>(item);
  return elements.size() <= step ||
         std::memcmp(elements.data(), elements.data() + step, elements.size() - step) == 0;
}

ElementCursor::ElementCursor(const TensorValues& values, int64_t chunk)
    : values_(values),
      item_(item_size_bytes(values.dtype)),
      size_(values.size_elements()),
      chunk_(chunk) {}

std::span<const std::byte> ElementCursor::at(int64_t begin, int64_t count) {
  if (begin < begin_ || begin + count > end_) {
    checkpoint::throw_if_cancelled();
    begin_ = begin;
    end_ = std::min(begin + std::max(chunk_, count), size_);
    bytes_ = read_elements(values_, begin_, end_ - begin_);
  }
  return std::span<const std::byte>(bytes_).subspan(static_cast<size_t>((begin - begin_) * item_),
                                                    static_cast<size_t>(count * item_));
}

WindowIndex::WindowIndex(const std::vector<TensorValues>& tensors, DType dtype)
    : item_(item_size_bytes(dtype)), heads_(tensors.size()), tails_(tensors.size()) {
  int64_t total = 0;
  for (const TensorValues& values : tensors) {
    if (values.dtype == dtype) total += values.size_elements();
  }
  stride_ = std::max<int64_t>(1, (total + kMaxWindows - 1) / kMaxWindows);
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].dtype == dtype) add(tensors[i], static_cast<int>(i));
  }
  std::sort(entries_.begin(), entries_.end());
}

void WindowIndex::add(const TensorValues& values, int tensor) {
  const int64_t size = values.size_elements(), few = std::min(size, kWindow);
  heads_[static_cast<size_t>(tensor)] = read_elements(values, 0, few);
  tails_[static_cast<size_t>(tensor)] = read_elements(values, size - few, few);
  if (size < kWindow) return;
  ElementCursor cursor(values, stride_ >= kSparse ? kWindow : 1 << 16);
  const int64_t last = size - kWindow;
  for (int64_t begin = 0; begin < last; begin += stride_) {
    add_window(cursor.at(begin, kWindow), {tensor, begin});
  }
  add_window(tail(tensor), {tensor, last});
}

void WindowIndex::add_window(std::span<const std::byte> window, Occurrence place) {
  if (!is_constant(window, item_)) entries_.push_back({hash_of(window), place});
}

std::vector<Occurrence> WindowIndex::find(std::span<const std::byte> window) const {
  std::vector<Occurrence> places;
  if (is_constant(window, item_)) return places;
  const uint64_t hash = hash_of(window);
  auto entry = std::lower_bound(entries_.begin(), entries_.end(), Entry{hash, {}});
  for (; entry != entries_.end() && entry->hash == hash && places.size() < kMaxPlaces; ++entry) {
    places.push_back(entry->place);
  }
  return places;
}

}  // namespace isoshard::reshard
