// safetensors: | u64 length of the header | JSON header, space-padded | tensors, contiguous from 0
// | Rules as in the format's README: offsets tile the buffer, names are unique, sizes fit shapes.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "core/dtype.h"
#include "core/storage.h"

namespace isoshard::checkpoint {

struct SafetensorsEntry {
  std::string name;
  DType dtype = DType::kFloat32;
  Shape shape;
  int64_t offset_bytes = 0;  // from the start of the file
};

struct SafetensorsIndex {
  std::vector<SafetensorsEntry> entries;  // in order of their bytes
  std::vector<std::pair<std::string, std::string>> metadata;
};

// Reads and checks the header. Throws Error(kCorrupt, kHostile, kLimit, kUnsupported).
SafetensorsIndex read_safetensors(const ReadableFile& file);

// Length and header for tensors that lie one behind another in the order given; the header is
// padded with spaces to a multiple of 8. `offset_bytes` of the entries is ignored.
std::string safetensors_head(const SafetensorsIndex& index);

}  // namespace isoshard::checkpoint
