// The first byte says what the others are: a file (0), or (1) a header up to the first NUL and then
// tensors, before which the length is put. What is accepted must read the same under the header
// that is written for it.
#include "checkpoint/format/safetensors.h"
#include "core/check.h"
#include "fuzz/targets.h"

namespace isoshard::fuzz::safetensors {
namespace {

std::string file_of(Bytes bytes) {
  Fields fields(bytes);
  const bool made = fields.number(1) % 2 == 1;
  const std::string text = text_of(fields.rest());
  if (!made) return text;
  const size_t length = std::min(text.find('\0'), text.size());
  std::string file;
  for (int i = 0; i < 8; ++i) file += static_cast<char>((length >> (8 * i)) & 0xFF);
  return file + text.substr(0, length) + text.substr(std::min(length + 1, text.size()));
}

}  // namespace

int run_one(Bytes bytes) {
  const std::string file = file_of(bytes);
  checkpoint::SafetensorsIndex index;
  std::string head;
  try {
    index = checkpoint::read_safetensors(BytesFile(bytes_of(file)));
    head = checkpoint::safetensors_head(index);
  } catch (const Error&) {
    return 0;
  }
  int64_t data_bytes = 0;
  for (const checkpoint::SafetensorsEntry& entry : index.entries)
    data_bytes += numel(entry.shape) * item_size_bytes(entry.dtype);
  CHECK(data_bytes <= static_cast<int64_t>(file.size()), "tensors leave the file");
  const std::string again = head + file.substr(file.size() - static_cast<size_t>(data_bytes));
  CHECK(checkpoint::safetensors_head(checkpoint::read_safetensors(BytesFile(bytes_of(again)))) ==
            head,
        "a header that is written and read changes");
  return 0;
}

}  // namespace isoshard::fuzz::safetensors
