// Record names and their order are those of torch.save (docs/formats/torch_file.md).
#include "reshard/target_file.h"

#include <algorithm>
#include <cstdio>

#include "checkpoint/format/crc.h"
#include "core/check.h"
#include "core/mutant.h"

namespace isoshard::reshard {

using checkpoint::FileBlueprint;
using checkpoint::StorageFill;

namespace {

std::string stem_of(const std::string& path) {
  const std::string base = path.substr(path.rfind('/') + 1);
  const std::string stem = base.substr(0, base.rfind('.'));
  const bool ascii = std::all_of(stem.begin(), stem.end(), [](char c) { return c > 0; });
  return ascii && !stem.empty() ? stem : "archive";
}

uint32_t crc_of(const std::string& text) {
  return checkpoint::crc32_of(std::as_bytes(std::span(text)));
}

// Torch writes a hash of the names and a hash of the CRCs; readers do not check them.
std::string serialization_id(const checkpoint::ZipLayout& zip, const std::vector<uint32_t>& crcs) {
  checkpoint::RawCrcs names, sums;
  for (int i = 0; i + 1 < zip.count(); ++i) names.update(std::as_bytes(std::span(zip.path(i))));
  sums.update(std::as_bytes(std::span(crcs.data(), crcs.size() - 1)));
  char buffer[41];
  std::snprintf(buffer, sizeof buffer, "%020llu%020llu",
                static_cast<unsigned long long>(names.ecma),
                static_cast<unsigned long long>(sums.ecma));
  return buffer;
}

}  // namespace

TargetFile::TargetFile(const FileBlueprint& blueprint) : path_(blueprint.path) {
  if (blueprint.kind == FileBlueprint::Kind::kTorch) {
    lay_out_torch(blueprint);
    return;
  }
  opening_.push_back({0, blueprint.head});
  size_bytes_ = static_cast<int64_t>(blueprint.head.size());
  for (const StorageFill& storage : blueprint.storages) {
    offsets_.push_back(size_bytes_);
    if (!storage.literal.empty()) opening_.push_back({size_bytes_, storage.literal});
    size_bytes_ += storage.size_bytes();
  }
}

void TargetFile::add_record(const std::string& name, const std::string& bytes) {
  const int number = zip_.add(prefix_ + "/" + name, static_cast<int64_t>(bytes.size()));
  opening_.push_back({zip_.record(number).header_offset, zip_.header(number) + bytes});
  literal_crcs_.push_back(crc_of(bytes));
}

void TargetFile::lay_out_torch(const FileBlueprint& blueprint) {
  torch_ = true;
  prefix_ = stem_of(path_);
  add_record("data.pkl", blueprint.head);
  add_record(".format_version", "1");
  add_record(".storage_alignment", "64");
  if (!mutant("target_byteorder_missing")) add_record("byteorder", "little");
  for (size_t i = 0; i < blueprint.storages.size(); ++i) {
    const StorageFill& storage = blueprint.storages[i];
    const int number = zip_.add(prefix_ + "/data/" + std::to_string(i), storage.size_bytes());
    opening_.push_back({zip_.record(number).header_offset, zip_.header(number) + storage.literal});
    storage_records_.push_back(number);
    offsets_.push_back(zip_.record(number).data_offset);
    literal_crcs_.push_back(0);
  }
  add_record("version", "3\n");
  const int last = zip_.add(prefix_ + "/.data/serialization_id", 40);
  opening_.push_back({zip_.record(last).header_offset, zip_.header(last)});
  literal_crcs_.push_back(0);
  size_bytes_ =
      zip_.directory_offset() + static_cast<int64_t>(zip_.directory(literal_crcs_).size());
}

std::vector<Literal> TargetFile::closing(const std::vector<uint32_t>& storage_crcs) const {
  if (!torch_) return {};
  CHECK(storage_crcs.size() == storage_records_.size(), "one CRC a storage");
  std::vector<uint32_t> crcs = literal_crcs_;
  for (size_t i = 0; i < storage_crcs.size(); ++i)
    crcs[static_cast<size_t>(storage_records_[i])] = storage_crcs[i];
  const std::string id = serialization_id(zip_, crcs);
  crcs.back() = crc_of(id);
  std::vector<Literal> result;
  for (int i = 0; i < zip_.count(); ++i) {
    const checkpoint::ZipRecord& record = zip_.record(i);
    std::string bytes = zip_.descriptor(i, crcs[static_cast<size_t>(i)]);
    int64_t offset = record.data_offset + record.size_bytes;
    if (i + 1 == zip_.count()) {
      bytes = id + bytes;
      offset = record.data_offset;
    }
    result.push_back({offset, std::move(bytes)});
  }
  result.push_back({zip_.directory_offset(), zip_.directory(crcs)});
  return result;
}

}  // namespace isoshard::reshard
