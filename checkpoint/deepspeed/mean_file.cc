// See mean_file.h.
#include "checkpoint/deepspeed/mean_file.h"

#include <algorithm>
#include <cstring>

#include "core/check.h"

namespace isoshard::checkpoint {
namespace {
constexpr int64_t kItem = sizeof(float);
}

MeanFile::MeanFile(std::string title, const std::vector<SourceFile>& files,
                   std::vector<std::vector<FileFragment>> tensors)
    : title_(std::move(title)), tensors_(std::move(tensors)) {
  for (const std::vector<FileFragment>& tensor : tensors_) {
    for (const FileFragment& f : tensor)
      files_.try_emplace(f.file, files[static_cast<size_t>(f.file)]);
  }
  CHECK(!tensors_.empty() && !tensors_[0].empty(), "a mean of nothing");
  const FileFragment& last = tensors_[0].back();
  size_bytes_ = (last.begin + last.count) * kItem;
}

void MeanFile::read_at(int64_t offset, std::span<std::byte> target) const {
  if (target.empty()) return;
  const int64_t begin = offset / kItem;
  const int64_t end = (offset + static_cast<int64_t>(target.size()) + kItem - 1) / kItem;
  std::vector<float> sum(static_cast<size_t>(end - begin), 0.0F), next(sum.size());
  for (const std::vector<FileFragment>& tensor : tensors_) {
    read_elements(tensor, begin, next);
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += next[i];
  }
  const auto count = static_cast<float>(tensors_.size());
  for (float& value : sum) value /= count;
  std::memcpy(target.data(), reinterpret_cast<const std::byte*>(sum.data()) + offset % kItem,
              target.size());
}

void MeanFile::read_elements(const std::vector<FileFragment>& fragments, int64_t begin,
                             std::span<float> target) const {
  const int64_t end = begin + static_cast<int64_t>(target.size());
  for (const FileFragment& f : fragments) {
    const int64_t from = std::max(begin, f.begin), to = std::min(end, f.begin + f.count);
    if (from >= to) continue;
    files_.at(f.file).bytes().read_at(
        f.offset_bytes + (from - f.begin) * kItem,
        std::as_writable_bytes(
            target.subspan(static_cast<size_t>(from - begin), static_cast<size_t>(to - from))));
  }
}

}  // namespace isoshard::checkpoint
