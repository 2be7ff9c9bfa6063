// The mean of equally large float32 tensors, as a file that is computed where it is read: what
// parameter_to_average_patterns asks for (deepspeed/checkpoint/ds_to_universal.py).
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "checkpoint/sharded_state.h"

namespace isoshard::checkpoint {

// Element i is (0 + a[i] + b[i] + …) / n in float32, one addition after the other, so that −0 means
// +0 even for one tensor. Copies the handles of the files that the fragments name.
class MeanFile : public ReadableFile {
 public:
  MeanFile(std::string title, const std::vector<SourceFile>& files,
           std::vector<std::vector<FileFragment>> tensors);

  const std::string& path() const override { return title_; }
  int64_t size_bytes() const override { return size_bytes_; }
  void read_at(int64_t offset, std::span<std::byte> target) const override;
  int64_t next_data(int64_t offset) const override { return offset; }
  int64_t next_hole(int64_t) const override { return size_bytes_; }

 private:
  void read_elements(const std::vector<FileFragment>& fragments, int64_t begin,
                     std::span<float> target) const;

  std::string title_;
  std::map<int, SourceFile> files_;  // those that the fragments name
  std::vector<std::vector<FileFragment>> tensors_;
  int64_t size_bytes_ = 0;
};

}  // namespace isoshard::checkpoint
