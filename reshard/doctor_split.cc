// A file that was written in blocks over an older one, and whose last bytes, which fill no block,
// were appended behind the older one's end (DeepSpeed's FastFileWriter):
//
//   | the new file's blocks | the older file from there on | the new file's last bytes |
//   0                       front                          S - back                    S
//
// The end record, which is the new file's, says how long that is: front + back. What is left open,
// how large a block was, is answered by trial: the two pieces joined must pass every check of
// zip.h, and the records at their seam fit their CRCs.
#include <algorithm>
#include <set>

#include "checkpoint/cancel.h"
#include "checkpoint/format/crc.h"
#include "checkpoint/format/zip.h"
#include "checkpoint/format/zip_fields.h"
#include "core/error.h"
#include "core/polynomial.h"
#include "reshard/doctor_rules.h"

namespace isoshard::reshard {
namespace {

using namespace checkpoint::zip;

constexpr int64_t kSector = 512;  // what direct I/O is aligned to, at least
constexpr int64_t kLargestBlock = 1 << 20;
constexpr int64_t kMostRead = 1 << 30;  // payload of all trials together
constexpr int64_t kChunk = 1 << 20;

// The first `front` bytes of a file and its last ones, without what lies between.
class Joined : public ReadableFile {
 public:
  Joined(const ReadableFile& file, int64_t front, int64_t size_bytes)
      : file_(file), front_(front), size_bytes_(size_bytes) {}
  const std::string& path() const override { return file_.path(); }
  int64_t size_bytes() const override { return size_bytes_; }
  void read_at(int64_t offset, std::span<std::byte> target) const override {
    const auto first = static_cast<size_t>(
        std::clamp<int64_t>(front_ - offset, 0, static_cast<int64_t>(target.size())));
    if (first > 0) file_.read_at(offset, target.first(first));
    const int64_t skipped = file_.size_bytes() - size_bytes_;
    if (first < target.size())
      file_.read_at(offset + static_cast<int64_t>(first) + skipped, target.subspan(first));
  }
  int64_t next_data(int64_t offset) const override { return offset; }
  int64_t next_hole(int64_t) const override { return size_bytes_; }

 private:
  const ReadableFile& file_;
  int64_t front_, size_bytes_;
};

std::string bytes_at(const ReadableFile& file, int64_t offset, int64_t count) {
  if (offset < 0 || offset > file.size_bytes() - count) return std::string(count, '\0');
  std::string text(static_cast<size_t>(count), '\0');
  file.read_at(offset, std::as_writable_bytes(std::span(text)));
  return text;
}

// How long the archive is whose end record ends the file, as that says itself; 0 without one.
int64_t declared_size(const ReadableFile& file) {
  const int64_t end_at = file.size_bytes() - kEndBytes;
  const std::string end = bytes_at(file, end_at, kEndBytes);
  if (load(end, 0, 4) != kEndSignature) return 0;
  const std::string locator = bytes_at(file, end_at - kLocatorBytes, kLocatorBytes);
  uint64_t before = load(end, 12, 4) + load(end, 16, 4);
  if (load(locator, 0, 4) == kLocatorSignature)
    before = load(locator, 8, 8) + kEnd64Bytes + kLocatorBytes;
  if (before >= static_cast<uint64_t>(file.size_bytes())) return 0;
  return static_cast<int64_t>(before) + kEndBytes;
}

bool crc_holds(const ReadableFile& file, const checkpoint::ZipRecord& record) {
  checkpoint::RawCrcs sum;
  std::vector<std::byte> chunk;
  for (int64_t at = 0; at < record.size_bytes; at += kChunk) {
    checkpoint::throw_if_cancelled();
    chunk.resize(static_cast<size_t>(std::min(kChunk, record.size_bytes - at)));
    file.read_at(record.data_offset + at, chunk);
    sum.update(chunk);
  }
  return static_cast<uint32_t>(crc32_polynomial().finish(sum.crc32, record.size_bytes)) ==
         record.crc32;
}

// Whether a file is a whole archive, as far as its bytes from `seam` on are concerned.
bool is_whole(const ReadableFile& file, int64_t seam, int64_t* left) {
  try {
    for (const checkpoint::ZipRecord& record : checkpoint::read_zip_index(file).records) {
      if (record.data_offset + record.size_bytes <= seam) continue;
      *left -= record.size_bytes;
      if (*left < 0 || !crc_holds(file, record)) return false;
    }
    return true;
  } catch (const Error& error) {
    if (error.info().code == ErrorCode::kInterrupted) throw;
    return false;
  }
}

// Where the appended bytes may begin in the new file, the nearest to its end first.
std::set<int64_t, std::greater<>> seams_of(int64_t size_bytes) {
  std::set<int64_t, std::greater<>> seams;
  for (int64_t sectors = 1; sectors <= 64; ++sectors)
    seams.insert(size_bytes / (sectors * kSector) * (sectors * kSector));
  for (int64_t block = kSector; block <= kLargestBlock; block *= 2)
    seams.insert(size_bytes / block * block);
  seams.erase(0);
  seams.erase(size_bytes);
  return seams;
}

}  // namespace

std::optional<SplitArchive> split_archive(const ReadableFile& file) {
  const int64_t size_bytes = declared_size(file);
  if (size_bytes <= 0 || size_bytes >= file.size_bytes()) return std::nullopt;
  int64_t left = kMostRead;
  if (is_whole(Joined(file, 0, size_bytes), size_bytes, &left)) return std::nullopt;  // appended
  for (const int64_t seam : seams_of(size_bytes)) {
    if (is_whole(Joined(file, seam, size_bytes), seam, &left))
      return SplitArchive{.front_bytes = seam, .back_bytes = size_bytes - seam};
  }
  return std::nullopt;
}

}  // namespace isoshard::reshard
