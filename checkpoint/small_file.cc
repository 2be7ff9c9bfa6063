// See small_file.h.
#include "checkpoint/small_file.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "checkpoint/cancel.h"
#include "checkpoint/hidden_name.h"
#include "core/error.h"
#include "core/mutant.h"

namespace isoshard::checkpoint {
namespace {

constexpr int64_t kCopyBytes = 1 << 20;

// Writes a hidden sibling by `write` and puts it in the place of `path`.
template <typename Write>
void replace_file(Storage& storage, const std::string& path, const Write& write) {
  const SplitPath parts = split_path(path);
  const std::string temporary = join_path(parts.parent, hidden_name(parts.name));
  const std::unique_ptr<WritableFile> file = storage.create(temporary);
  try {
    write(file.get());
    if (!mutant("pointer_unsynced")) file->sync();
    file->close();
    storage.rename_over(temporary, path);
  } catch (...) {
    try {
      storage.remove_file(temporary);
    } catch (const Error&) {
      // The first failure is the one to report.
    }
    throw;
  }
  try {
    if (!mutant("pointer_name_unsynced")) storage.sync_directory(parts.parent);
  } catch (const Error& error) {
    ErrorInfo info = error.info();
    info.safe = "the new text stands under its name, but a power failure may undo that";
    throw Error(std::move(info));
  }
}

}  // namespace

void write_new_file(Storage& storage, const std::string& path, const std::string& bytes) {
  const std::unique_ptr<WritableFile> file = storage.create(path);
  file->write_at(0, std::as_bytes(std::span(bytes)));
  file->sync();
  file->close();
}

void replace_small_file(Storage& storage, const std::string& path, const std::string& text) {
  replace_file(storage, path,
               [&](WritableFile* file) { file->write_at(0, std::as_bytes(std::span(text))); });
}

void copy_file(Storage& storage, const std::string& from, const std::string& to) {
  const std::unique_ptr<ReadableFile> source = storage.open_read(from);
  replace_file(storage, to, [&](WritableFile* file) {
    std::vector<std::byte> buffer;
    for (int64_t at = 0; at < source->size_bytes(); at += kCopyBytes) {
      throw_if_cancelled();
      buffer.resize(static_cast<size_t>(std::min(kCopyBytes, source->size_bytes() - at)));
      source->read_at(mutant("copy_first_piece_only") ? 0 : at, buffer);
      file->write_at(at, buffer);
    }
  });
}

bool same_bytes(Storage& storage, const std::string& a, const std::string& b) {
  const std::unique_ptr<ReadableFile> first = storage.open_read(a), second = storage.open_read(b);
  if (first->size_bytes() != second->size_bytes()) return false;
  std::vector<std::byte> x, y;
  for (int64_t at = 0; at < first->size_bytes(); at += kCopyBytes) {
    throw_if_cancelled();
    x.resize(static_cast<size_t>(std::min(kCopyBytes, first->size_bytes() - at)));
    y.resize(x.size());
    first->read_at(at, x);
    second->read_at(at, y);
    if (x != y && !mutant("same_bytes_by_size")) return false;
  }
  return true;
}

}  // namespace isoshard::checkpoint
