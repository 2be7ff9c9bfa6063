// See literal_file.h.
#include "reshard/literal_file.h"

#include <cstring>
#include <vector>

#include "checkpoint/format/crc.h"
#include "core/check.h"
#include "core/mutant.h"
#include "core/polynomial.h"
#include "reshard/target_file.h"

namespace isoshard::reshard {

FileHash write_literal_file(Storage& storage, const checkpoint::FileBlueprint& blueprint,
                            const std::string& folder, bool sync) {
  const TargetFile layout(blueprint);
  std::vector<std::byte> image(static_cast<size_t>(layout.size_bytes()));
  const auto put = [&](const Literal& literal) {
    std::memcpy(image.data() + literal.offset_bytes, literal.bytes.data(), literal.bytes.size());
  };
  for (const Literal& literal : layout.opening()) {
    if (!literal.bytes.empty()) put(literal);
  }
  std::vector<uint32_t> crcs;
  for (size_t i = 0; i < blueprint.storages.size(); ++i) {
    const checkpoint::StorageFill& fill = blueprint.storages[i];
    CHECK(fill.runs.empty() && !fill.copy, "a file that is not literal: " + blueprint.path);
    const auto begin = static_cast<size_t>(layout.storage_offset(static_cast<int>(i)));
    crcs.push_back(mutant("literal_crc_of_nothing")
                       ? 0
                       : checkpoint::crc32_of(std::span(image).subspan(
                             begin, static_cast<size_t>(fill.size_bytes()))));
  }
  for (const Literal& literal : layout.closing(crcs)) put(literal);
  checkpoint::RawCrcs sums;
  sums.update(image);
  const std::unique_ptr<WritableFile> file = storage.create(folder + "/" + blueprint.path);
  file->write_at(0, image);
  if (sync) file->sync();
  file->close();
  return {blueprint.path, layout.size_bytes(),
          crc64_ecma_polynomial().finish(sums.ecma, layout.size_bytes()),
          crc64_jones_polynomial().finish(sums.jones, layout.size_bytes())};
}

}  // namespace isoshard::reshard
