// Streams both tensors in pieces, so that memory does not grow with them.
#include "checkpoint/deepspeed/master_compare.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "checkpoint/format/crc.h"
#include "core/cast.h"

namespace isoshard::checkpoint {
namespace {

// Fills `target` with the elements of a tensor from element `begin` on.
void read_elements(const ShardedState& state, const Leaf& leaf, int64_t begin,
                   std::span<std::byte> target) {
  const std::vector<FileFragment>& fragments = leaf.fragments;
  const int64_t item = item_size_bytes(leaf.dtype);
  auto next = std::upper_bound(fragments.begin(), fragments.end(), begin,
                               [](int64_t at, const FileFragment& f) { return at < f.begin; });
  for (const FileFragment* f = &*--next; !target.empty(); ++f) {
    const int64_t count =
        std::min(f->begin + f->count - begin, static_cast<int64_t>(target.size()) / item);
    const ReadableFile& file = state.files[static_cast<size_t>(f->file)].bytes();
    file.read_at(f->offset_bytes + (begin - f->begin) * item,
                 target.first(static_cast<size_t>(count * item)));
    target = target.subspan(static_cast<size_t>(count * item));
    begin += count;
  }
}

bool is_nan(DType dtype, std::span<const std::byte> element) {
  if (!is_floating(dtype) || !can_cast(dtype, DType::kFloat32)) return false;
  float value = 0;
  cast(dtype, element, DType::kFloat32, std::as_writable_bytes(std::span(&value, 1)));
  return std::isnan(value);
}

std::string bits_of(std::span<const std::byte> element) {
  uint64_t bits = 0;
  const size_t length = std::min(element.size(), sizeof bits);
  std::memcpy(&bits, element.data(), length);
  return "0x" + hex16(bits).substr(16 - 2 * length);
}

}  // namespace

std::optional<Difference> compare(const ShardedState& state, const Leaf& master,
                                  const Leaf& module) {
  const int64_t master_item = item_size_bytes(master.dtype);
  const int64_t item = item_size_bytes(module.dtype);
  const int64_t total = numel(master.shape);
  std::vector<std::byte> raw, expected, found;
  // The first piece is short: tensors that differ mostly do so at once.
  for (int64_t begin = 0, piece = 1024; begin < total; begin += piece, piece = 1 << 18) {
    const int64_t count = std::min(piece, total - begin);
    raw.resize(static_cast<size_t>(count * master_item));
    expected.resize(static_cast<size_t>(count * item));
    found.resize(static_cast<size_t>(count * item));
    read_elements(state, master, begin, raw);
    read_elements(state, module, begin, found);
    cast(master.dtype, raw, module.dtype, expected);
    if (expected == found) continue;
    for (int64_t i = 0; i < count; ++i) {
      const size_t at = static_cast<size_t>(i * item), length = static_cast<size_t>(item);
      const std::span<const std::byte> a = std::span(expected).subspan(at, length);
      const std::span<const std::byte> b = std::span(found).subspan(at, length);
      // Which NaN a cast makes differs between processors.
      if (std::ranges::equal(a, b) || (is_nan(module.dtype, a) && is_nan(module.dtype, b)))
        continue;
      return Difference{begin + i, bits_of(a), bits_of(b)};
    }
  }
  return std::nullopt;
}

}  // namespace isoshard::checkpoint
