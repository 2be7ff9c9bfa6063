// See deep_reading.h.
#include "reshard/deep_reading.h"

#include <algorithm>
#include <functional>
#include <vector>

#include "checkpoint/cancel.h"
#include "checkpoint/deepspeed/source.h"
#include "core/error.h"

namespace isoshard::reshard {
namespace {

constexpr int kDeepest = 8;  // folders in folders: zero/<name> may have '/' in it
constexpr int64_t kStepBytes = 1 << 20;

void for_each_file(Storage& storage, const std::string& folder, const std::string& inside,
                   int depth, const std::function<void(const std::string&)>& visit) {
  checkpoint::throw_if_cancelled();
  for (const DirectoryEntry& entry : storage.list(checkpoint::join(folder, inside))) {
    const std::string relative = inside.empty() ? entry.name : inside + "/" + entry.name;
    if (entry.kind == DirectoryEntry::Kind::kFile) visit(relative);
    if (entry.kind == DirectoryEntry::Kind::kDirectory && depth < kDeepest)
      for_each_file(storage, folder, relative, depth + 1, visit);
  }
}

}  // namespace

DeepReading drop_pages(Storage& storage, const std::string& folder) {
  DeepReading result;
  for_each_file(storage, folder, "", 0, [&](const std::string& relative) {
    try {
      storage.drop_cache(checkpoint::join(folder, relative));
      ++result.dropped;
    } catch (const Error& error) {
      if (error.info().code == ErrorCode::kInterrupted) throw;
      ++result.kept;
    }
  });
  return result;
}

int64_t read_other_files(Storage& storage, const std::string& folder,
                         const std::set<std::string>& known) {
  int64_t count = 0;
  std::vector<std::byte> step(kStepBytes);
  for_each_file(storage, folder, "", 0, [&](const std::string& relative) {
    if (known.contains(relative)) return;
    const auto file = storage.open_read(checkpoint::join(folder, relative));
    for (int64_t at = 0; at < file->size_bytes(); at += kStepBytes) {
      checkpoint::throw_if_cancelled();
      const int64_t bytes = std::min(kStepBytes, file->size_bytes() - at);
      file->read_at(at, std::span(step).first(static_cast<size_t>(bytes)));
    }
    ++count;
  });
  return count;
}

}  // namespace isoshard::reshard
