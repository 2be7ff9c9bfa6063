// The bytes describe a checkpoint folder, file by file:
//
//   | kind | name length | name | u16 size | content |
//
// kind 0: the content as it is. 1: it is the data.pkl of a sound file of torch.save. 2: likewise,
// and 3: as it is; both with a manifest in that folder that fits all its files.
#include <set>

#include "checkpoint/deepspeed/reader.h"
#include "checkpoint/deepspeed/source.h"
#include "checkpoint/format/crc.h"
#include "checkpoint/manifest.h"
#include "core/utf8.h"
#include "fuzz/archive.h"
#include "fuzz/targets.h"
#include "reshard/verify.h"

namespace isoshard::fuzz::folder_tree {
namespace {

constexpr size_t kMostFiles = 400;

std::string stem_of(const std::string& name) { return name.substr(0, name.rfind('.')); }

// A manifest of the files that lie in the folder itself.
void seal(Storage& storage, const std::string& folder) {
  checkpoint::Manifest manifest{.files = {}, .program_version = "fuzzed"};
  try {
    for (const DirectoryEntry& entry : storage.list(folder)) {
      if (entry.kind != DirectoryEntry::Kind::kFile || !why_unsafe_name(entry.name).empty())
        continue;
      const std::string text =
          read_small_file(storage, checkpoint::join(folder, entry.name), int64_t{1} << 24);
      manifest.files.push_back(
          {entry.name, entry.size_bytes, "sha256:" + checkpoint::sha256_hex(text)});
    }
    put(storage, checkpoint::join(folder, checkpoint::kManifestName), to_json(manifest));
  } catch (const Error&) {
  }
}

void make_folder(Storage& storage, Bytes bytes) {
  Fields fields(bytes);
  std::set<std::string> sealed;
  storage.make_directories("/c");
  for (size_t files = 0; files < kMostFiles && !fields.empty(); ++files) {
    const size_t kind = fields.number(1);
    const std::string path = "/c/" + fields.text(fields.number(1));
    const std::string content = fields.text(fields.number(2));
    const bool made = kind % 4 == 1 || kind % 4 == 2;
    put(storage, path,
        made ? torch_archive(stem_of(checkpoint::base_name(path)), content) : content);
    if (kind % 4 >= 2) sealed.insert(checkpoint::parent_folder(path));
  }
  for (const std::string& folder : sealed) seal(storage, folder);
}

}  // namespace

int run_one(Bytes bytes) {
  checkpoint::MemoryStorage storage;
  make_folder(storage, bytes);
  checkpoint::ReadOptions read;
  read.workers = 1;
  try {
    checkpoint::read_checkpoint(storage, "/c", read);
  } catch (const Error&) {
  }
  try {
    reshard::StreamOptions stream;
    stream.workers = 1;
    reshard::verify(storage, "/c", {.read = read, .stream = stream});
  } catch (const Error&) {
  }
  return 0;
}

}  // namespace isoshard::fuzz::folder_tree
