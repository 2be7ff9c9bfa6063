// A file of torch.save whose zip directory is gone or does not fit: cut short by a full disk, or
// damaged between its records. data.pkl is read
// from the front, and says where all else must stand; torn_chain.h proves what does.
//
//   | header | prefix/data.pkl | data | descriptor | …
//              must be whole, its CRC right
//
// Local headers of torch hold neither sizes nor CRCs; the descriptor behind the data holds both. An
// intact file is read by torch_file.h, whose rules are stricter.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "checkpoint/format/zip.h"
#include "core/storage.h"

namespace isoshard::checkpoint {

struct TornStorage {
  int64_t size_bytes = 0;           // as the pickle has it
  std::optional<ZipRecord> record;  // where it is proven
  std::string why;                  // why there is none
};

struct TornFile {
  std::string prefix;
  std::string pickle;                 // the bytes of data.pkl, whose CRC is right
  std::vector<TornStorage> storages;  // number k is data/k
};

// Throws Error(kCorrupt, kIncomplete) where data.pkl cannot be proven, and what the ordinary reader
// throws for a hostile file: kHostile, kLimit. Reads the payloads once, for their CRCs.
TornFile read_torn_file(const ReadableFile& file);

// The bytes of each storage that the pickle in `bytes` names, by key; keys must be 0 … n−1.
std::vector<int64_t> storage_sizes(const std::string& bytes, const std::string& path);

}  // namespace isoshard::checkpoint
