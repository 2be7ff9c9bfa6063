// The bytes describe records and edits of the finished archive (zip_records.h). Without edits the
// reader must find the very records that were written, or refuse a name.
#include <utility>
#include <vector>

#include "checkpoint/format/zip.h"
#include "core/check.h"
#include "fuzz/archive.h"
#include "fuzz/targets.h"
#include "fuzz/zip_records.h"

namespace isoshard::fuzz {

DescribedZip described_zip(Bytes bytes) {
  Fields fields(bytes);
  std::vector<std::pair<std::string, std::string>> records;
  for (size_t count = fields.number(1); records.size() < count && !fields.empty();) {
    std::string name = fields.text(fields.number(1));
    records.emplace_back(std::move(name), fields.text(fields.number(2)));
  }
  DescribedZip zip{.archive = zip_archive(records)};
  while (!fields.empty()) {
    const size_t place = fields.number(3) % zip.archive.size();
    char* const byte = &zip.archive[zip.archive.size() - 1 - place];
    *byte = static_cast<char>(*byte ^ static_cast<char>(fields.number(1)));
    zip.edited = true;
  }
  return zip;
}

namespace zip_records {

int run_one(Bytes bytes) {
  const DescribedZip zip = described_zip(bytes);
  zip::run_one(bytes_of(zip.archive));
  if (zip.edited) return 0;
  try {
    const checkpoint::ZipIndex index = checkpoint::read_zip_index(BytesFile(bytes_of(zip.archive)));
    std::vector<std::pair<std::string, std::string>> records;
    for (const checkpoint::ZipRecord& record : index.records) {
      records.emplace_back(index.prefix + "/" + record.name,
                           zip.archive.substr(static_cast<size_t>(record.data_offset),
                                              static_cast<size_t>(record.size_bytes)));
    }
    CHECK(index.torch_dialect, "our own archive is not taken for torch's");
    CHECK(zip_archive(records) == zip.archive, "an archive that is read and written changes");
  } catch (const Error&) {
  }
  return 0;
}

}  // namespace zip_records
}  // namespace isoshard::fuzz
