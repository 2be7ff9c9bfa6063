// What is built from the primitives of Storage.
#include "core/storage.h"

#include "core/error.h"

namespace isoshard {

std::string read_small_file(Storage& storage, const std::string& path, int64_t limit_bytes) {
  const std::unique_ptr<ReadableFile> file = storage.open_read(path);
  if (file->size_bytes() > limit_bytes) {
    throw Error(ErrorInfo{.code = ErrorCode::kLimit,
                          .what = "A file that must be small is large.",
                          .file = path,
                          .expected = "at most " + std::to_string(limit_bytes) + " bytes",
                          .found = std::to_string(file->size_bytes()) + " bytes",
                          .next = "look at the file; it is not what its name says"});
  }
  std::string text(static_cast<size_t>(file->size_bytes()), '\0');
  file->read_at(0, std::as_writable_bytes(std::span(text)));
  return text;
}

}  // namespace isoshard
