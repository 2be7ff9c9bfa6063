// See archive.h.
#include "fuzz/archive.h"

#include <algorithm>
#include <map>

#include "checkpoint/format/crc.h"
#include "checkpoint/format/pickle_reader.h"
#include "checkpoint/format/torch_file.h"
#include "checkpoint/format/zip.h"
#include "core/error.h"
#include "fuzz/fuzz_storage.h"

namespace isoshard::fuzz {
namespace {

using checkpoint::Kind;
using checkpoint::NodeId;
using checkpoint::Pickle;

constexpr int64_t kMostStorage = 1 << 16, kMostStorages = 1 << 20;

int64_t item_bytes(const std::string& storage_class) {
  for (int i = 0; i <= static_cast<int>(DType::kComplex128); ++i) {
    const auto dtype = static_cast<DType>(i);
    if (checkpoint::storage_type_name(dtype) == storage_class) return item_size_bytes(dtype);
  }
  return 1;
}

// Key and bytes of each storage: ("storage", class, key, location, numel).
std::map<std::string, int64_t> storages_of(const Pickle& pickle) {
  std::map<std::string, int64_t> sizes;
  for (NodeId node = 0; node < pickle.size(); ++node) {
    if (pickle.kind(node) != Kind::kPersistent) continue;
    const NodeId id = pickle.persistent_id(node);
    if (pickle.kind(id) != Kind::kTuple || pickle.items(id).size() != 5) continue;
    const NodeId type = pickle.items(id)[1], key = pickle.items(id)[2], numel = pickle.items(id)[4];
    if (pickle.kind(type) != Kind::kGlobal || pickle.kind(key) != Kind::kString) continue;
    if (pickle.kind(numel) != Kind::kInt || pickle.text(key).size() > 100) continue;
    const int64_t count = std::clamp(pickle.integer_value(numel), int64_t{0}, kMostStorage);
    sizes[pickle.text(key)] = count * item_bytes(pickle.attribute(type));
  }
  return sizes;
}

}  // namespace

std::string zip_archive(const std::vector<std::pair<std::string, std::string>>& records) {
  checkpoint::ZipLayout layout;
  std::vector<uint32_t> crcs;
  std::string archive;
  for (const auto& [path, data] : records) {
    const int number = layout.add(path, static_cast<int64_t>(data.size()));
    crcs.push_back(checkpoint::crc32_of(bytes_of(data)));
    archive += layout.header(number) + data + layout.descriptor(number, crcs.back());
  }
  return archive + layout.directory(crcs);
}

std::string torch_archive(const std::string& prefix, const std::string& data_pkl) {
  std::vector<std::pair<std::string, std::string>> records = {{"data.pkl", data_pkl},
                                                              {".format_version", "1"},
                                                              {".storage_alignment", "64"},
                                                              {"byteorder", "little"}};
  try {
    int64_t left = kMostStorages;
    for (const auto& [key, size_bytes] : storages_of(checkpoint::read_pickle(data_pkl, "made"))) {
      if (size_bytes > kMostStorage || size_bytes > left) continue;
      left -= size_bytes;
      records.emplace_back("data/" + key, std::string(static_cast<size_t>(size_bytes), '\0'));
    }
  } catch (const Error&) {
  }
  records.emplace_back("version", "3\n");
  records.emplace_back(".data/serialization_id", std::string(40, '0'));
  for (auto& [name, data] : records) name = prefix + "/" + name;
  return zip_archive(records);
}

}  // namespace isoshard::fuzz
