// Parts of a source file by the bytes they take, for the executor: who wants a byte, and which are
// wanted at all.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "checkpoint/format/zip.h"
#include "reshard/crc_sum.h"
#include "reshard/plan.h"

namespace isoshard::reshard {

// Bytes of a source file that belong to a leaf. Behind the last leaf come the whole files.
struct Span {
  int64_t offset, size, leaf, leaf_offset;
};

// Items with `offset` and `size`, sorted by offset, possibly overlapping.
template <typename Item>
class Intervals {
 public:
  void set(std::vector<Item> items) {
    items_ = std::move(items);
    int64_t reach = 0;
    for (const Item& item : items_) reach_.push_back(reach = std::max(reach, end(item)));
  }
  template <typename Visit>
  void overlapping(int64_t from, int64_t to, const Visit& visit) const {
    size_t i =
        static_cast<size_t>(std::upper_bound(reach_.begin(), reach_.end(), from) - reach_.begin());
    for (; i < items_.size() && begin(items_[i]) < to; ++i) {
      if (end(items_[i]) > from) visit(items_[i]);
    }
  }

 private:
  static int64_t begin(const Span& item) { return item.offset; }
  static int64_t end(const Span& item) { return item.offset + item.size; }
  static int64_t begin(const Transfer& item) { return item.source_offset; }
  static int64_t end(const Transfer& item) { return item.source_offset + item.size_bytes; }

  std::vector<Item> items_;
  std::vector<int64_t> reach_;
};

using Ranges = std::vector<std::pair<int64_t, int64_t>>;  // [begin, end)

// Sorts, and joins ranges that overlap or touch.
inline void merge(Ranges* ranges) {
  std::sort(ranges->begin(), ranges->end());
  Ranges joined;
  for (const auto& range : *ranges) {
    if (!joined.empty() && range.first <= joined.back().second) {
      joined.back().second = std::max(joined.back().second, range.second);
    } else {
      joined.push_back(range);
    }
  }
  *ranges = std::move(joined);
}

// A record that is read, whole, for its CRC.
struct Record {
  int64_t offset, size;
  const checkpoint::ZipRecord* zip;
  CrcSum* sum;
};

// Of one source file.
struct SourceJob {
  Intervals<Transfer> transfers;
  Intervals<Span> spans;
  std::vector<Record> records;  // those that are read, sorted
};

}  // namespace isoshard::reshard
