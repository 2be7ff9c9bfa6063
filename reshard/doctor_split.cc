// A file that was written in blocks over an older one, and whose last bytes, which fill no block,
// were appended behind the older one's end (DeepSpeed's FastFileWriter):
//
//   | the new file's blocks | the older file from there on | the new file's last bytes |
//   0                       front                          S - back                    S
//
// The end record, which is the new file's, says how long that is: front + back. What is left open,
// how large a block was, is answered by trial: the two pieces joined must pass every check of
// zip.h, and each record fit its CRC.
#include <algorithm>

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
constexpr int64_t kMostDirectory = 32 << 20;  // bytes of directories, of all trials together
constexpr int64_t kMostRead = 1 << 30;        // bytes of payload
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

// What the end record of a file says of the archive that it ends.
struct Declared {
  int64_t size_bytes = 0;  // 0 without an end record, or where it says what cannot be
  int64_t directory = 0;   // where its directory begins
};

Declared declared_by(const ReadableFile& file) {
  const int64_t end_at = file.size_bytes() - kEndBytes;
  const std::string end = bytes_at(file, end_at, kEndBytes);
  if (load(end, 0, 4) != kEndSignature) return {};
  const std::string locator = bytes_at(file, end_at - kLocatorBytes, kLocatorBytes);
  uint64_t directory = load(end, 16, 4), before = directory + load(end, 12, 4);
  if (load(locator, 0, 4) == kLocatorSignature) {
    const std::string end64 = bytes_at(file, end_at - kLocatorBytes - kEnd64Bytes, kEnd64Bytes);
    directory = load(end64, 48, 8);
    before = load(locator, 8, 8) + kEnd64Bytes + kLocatorBytes;
  }
  const auto size = static_cast<uint64_t>(file.size_bytes());
  if (before >= size || directory >= before) return {};
  return {static_cast<int64_t>(before) + kEndBytes, static_cast<int64_t>(directory)};
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

struct Budget {
  int64_t directory = kMostDirectory;
  int64_t payload = kMostRead;
};

// Whether a file is a whole archive, every payload included; false where the budget ends.
bool is_whole(const ReadableFile& file, int64_t directory, Budget* budget) {
  checkpoint::throw_if_cancelled();
  try {
    if (load(bytes_at(file, directory, 4), 0, 4) != kCentralSignature) return false;
    budget->directory -= file.size_bytes() - directory;
    if (budget->directory < 0) return false;
    for (const checkpoint::ZipRecord& record : checkpoint::read_zip_index(file).records) {
      budget->payload -= record.size_bytes;
      if (budget->payload < 0 || !crc_holds(file, record)) return false;
    }
    return true;
  } catch (const Error& error) {
    if (error.info().code == ErrorCode::kInterrupted) throw;
    return false;
  }
}

// Where the appended bytes may begin in the new file, usual blocks first.
std::vector<int64_t> seams_of(int64_t size_bytes) {
  std::vector<int64_t> seams;
  const auto add = [&](int64_t block) {
    const int64_t seam = size_bytes / block * block;
    if (seam > 0 && seam < size_bytes && std::ranges::find(seams, seam) == seams.end())
      seams.push_back(seam);
  };
  for (int64_t block = kSector; block <= kLargestBlock; block *= 2) add(block);
  for (int64_t sectors = 3; sectors <= 64; ++sectors) add(sectors * kSector);
  return seams;
}

// Whether what lies between the pieces is the end of an archive, as it is where an older file lay.
// A piece of a file that was sent twice looks the same, but then the front is whole without it.
bool is_older(const ReadableFile& file, const SplitArchive& split, Budget* budget) {
  const int64_t old_size = file.size_bytes() - split.back_bytes;
  if (old_size - kEndBytes < split.front_bytes) return false;
  if (load(bytes_at(file, old_size - kEndBytes, 4), 0, 4) != kEndSignature) return false;
  const Declared old = declared_by(Joined(file, old_size, old_size));
  return !is_whole(Joined(file, old.size_bytes, old.size_bytes), old.directory, budget);
}

}  // namespace

std::optional<SplitArchive> split_archive(const ReadableFile& file) {
  const auto [size_bytes, directory] = declared_by(file);
  if (size_bytes <= 0 || size_bytes >= file.size_bytes()) return std::nullopt;
  Budget budget;
  if (is_whole(Joined(file, 0, size_bytes), directory, &budget)) return std::nullopt;  // appended
  // Where old and new bytes are equal, several seams give the same whole: the true one is the one
  // behind which the older file ends.
  std::optional<SplitArchive> found;
  for (const int64_t seam : seams_of(size_bytes)) {
    if (!is_whole(Joined(file, seam, size_bytes), directory, &budget)) continue;
    SplitArchive split{.front_bytes = seam, .back_bytes = size_bytes - seam};
    split.older = is_older(file, split, &budget);
    if (!found || split.older) found = split;
    if (split.older) break;
  }
  return found;
}

}  // namespace isoshard::reshard
