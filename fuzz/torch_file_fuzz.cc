// The first byte says what the others are: an archive (0), or the data.pkl of a sound one (1).
// Every node is asked for its tensor, as readers do for those they look for.
#include "checkpoint/format/torch_file.h"
#include "core/check.h"
#include "fuzz/archive.h"
#include "fuzz/targets.h"

namespace isoshard::fuzz::torch_file {
namespace {

void look_at(const checkpoint::TorchFile& file, checkpoint::NodeId node) {
  try {
    const std::optional<checkpoint::TensorView> view = file.tensor(node);
    if (!view) return;
    const int64_t offset = file.data_offset(*view);
    const checkpoint::ZipRecord& record = file.record(view->storage);
    const int64_t end = record.data_offset + record.size_bytes;
    if (!view->is_contiguous() || numel(view->shape) == 0) return;
    CHECK(offset >= record.data_offset, "a tensor begins before its record");
    CHECK(offset + numel(view->shape) * item_size_bytes(view->dtype) <= end,
          "a tensor leaves its record");
  } catch (const Error&) {
  }
}

}  // namespace

int run_one(Bytes bytes) {
  Fields fields(bytes);
  const bool made = fields.number(1) % 2 == 1;
  const std::string text = text_of(fields.rest());
  checkpoint::MemoryStorage storage;
  put(storage, "/c/weights.pt", made ? torch_archive("weights", text) : text);
  try {
    const checkpoint::TorchFile file(storage, "/c/weights.pt");
    for (checkpoint::NodeId node = 0; node < file.pickle().size(); ++node) look_at(file, node);
  } catch (const Error&) {
  }
  return 0;
}

}  // namespace isoshard::fuzz::torch_file
