// See stand_in.h: pieces as a file, and the storage that shows them.
#include <algorithm>
#include <cstring>

#include "checkpoint/deepspeed/source.h"
#include "core/error.h"
#include "reshard/stand_in.h"

namespace isoshard::reshard {
namespace {

class PieceFile : public ReadableFile {
 public:
  PieceFile(std::string path, std::shared_ptr<const Pieces> pieces)
      : path_(std::move(path)), pieces_(std::move(pieces)) {}
  const std::string& path() const override { return path_; }
  int64_t size_bytes() const override { return pieces_->size_bytes; }
  void read_at(int64_t offset, std::span<std::byte> target) const override {
    if (offset < 0 || offset > size_bytes() - static_cast<int64_t>(target.size()))
      throw Error(ErrorInfo{.code = ErrorCode::kCorrupt,
                            .what = "A read reaches beyond the file.",
                            .file = path_,
                            .expected = std::to_string(size_bytes()) + " bytes",
                            .found = std::to_string(offset)});
    pieces_->read_at(offset, target);
  }
  int64_t next_data(int64_t offset) const override { return std::min(offset, size_bytes()); }
  int64_t next_hole(int64_t) const override { return size_bytes(); }

 private:
  std::string path_;
  std::shared_ptr<const Pieces> pieces_;
};

}  // namespace

void Pieces::read_at(int64_t offset, std::span<std::byte> target) const {
  std::memset(target.data(), 0, target.size());
  const int64_t end = offset + static_cast<int64_t>(target.size());
  auto piece = std::partition_point(pieces.begin(), pieces.end(), [&](const Piece& p) {
    return p.offset_bytes + p.size_bytes <= offset;
  });
  for (; piece != pieces.end() && piece->offset_bytes < end; ++piece) {
    const int64_t from = std::max(offset, piece->offset_bytes);
    const int64_t count = std::min(end, piece->offset_bytes + piece->size_bytes) - from;
    const std::span<std::byte> part =
        target.subspan(static_cast<size_t>(from - offset), static_cast<size_t>(count));
    const int64_t inside = from - piece->offset_bytes;
    const std::string& bytes = piece->shared ? *piece->shared : piece->literal;
    if (bytes.empty())
      source->read_at(piece->source_offset + inside, part);
    else
      std::memcpy(part.data(), bytes.data() + inside, part.size());
  }
}

void StandInStorage::put(const std::string& name, std::shared_ptr<const Pieces> contents) {
  files_[checkpoint::join(folder_, name)] = std::move(contents);
}

std::unique_ptr<ReadableFile> StandInStorage::open_read(const std::string& path) {
  const auto stands = files_.find(path);
  if (stands != files_.end()) return std::make_unique<PieceFile>(path, stands->second);
  return base_.open_read(path);
}

std::vector<DirectoryEntry> StandInStorage::list(const std::string& directory) {
  std::vector<DirectoryEntry> entries = base_.list(directory);
  std::erase_if(entries, [&](const DirectoryEntry& entry) {
    return files_.contains(checkpoint::join(directory, entry.name));
  });
  const std::string inside = checkpoint::join(directory, "");
  for (auto at = files_.lower_bound(inside); at != files_.end() && at->first.starts_with(inside);
       ++at) {
    const auto& [path, contents] = *at;
    if (path.find('/', inside.size()) != std::string::npos) continue;
    entries.push_back({.name = checkpoint::base_name(path),
                       .kind = DirectoryEntry::Kind::kFile,
                       .size_bytes = contents->size_bytes});
  }
  std::ranges::sort(entries, {}, &DirectoryEntry::name);
  return entries;
}

bool StandInStorage::is_file(const std::string& path) {
  return files_.contains(path) || base_.is_file(path);
}

}  // namespace isoshard::reshard
