// The bytes are an archive. What is accepted must lie in the file, one record behind another.
#include "checkpoint/format/zip.h"
#include "core/check.h"
#include "fuzz/targets.h"

namespace isoshard::fuzz::zip {

int run_one(Bytes bytes) {
  try {
    const checkpoint::ZipIndex index = checkpoint::read_zip_index(BytesFile(bytes));
    int64_t cursor = 0;
    for (const checkpoint::ZipRecord& record : index.records) {
      CHECK(record.header_offset >= cursor && record.data_offset > record.header_offset,
            "records overlap");
      CHECK(record.size_bytes >= 0, "a negative size");
      cursor = record.data_offset + record.size_bytes;
    }
    CHECK(cursor <= static_cast<int64_t>(bytes.size()), "a record leaves the file");
  } catch (const Error&) {
  }
  return 0;
}

}  // namespace isoshard::fuzz::zip
