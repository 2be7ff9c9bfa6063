// MANIFEST.json: every file of a published folder with its size and hash, written last, so that its
// presence says that the folder is whole and its contents say whether it still is.
//
//   {
//    "files": [
//     {
//      "hash": "crc64x2:00112233445566778899aabbccddeeff",
//      "path": "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
//      "size_bytes": 4096
//     }
//    ],
//    "kind": "isoshard-manifest",
//    "program_version": "0.1.0",
//    "schema": 1,
//    "self_hash": "sha256:…"       of this very text without this member
//   }
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace isoshard::checkpoint {

inline constexpr const char* kManifestName = "MANIFEST.json";

// Half a million files with long names. Larger ones are neither written nor read.
inline constexpr size_t kLargestManifestBytes = size_t{128} << 20;

struct ManifestFile {
  std::string path;        // relative to the manifest's folder; safe (core/utf8.h)
  int64_t size_bytes = 0;  // >= 0
  std::string hash;        // "<algorithm>:<lower-case hex>"
  bool operator==(const ManifestFile&) const = default;
};

struct Manifest {
  std::vector<ManifestFile> files;  // no path twice; parse_manifest returns them sorted by path
  std::string program_version;
  bool operator==(const Manifest&) const = default;
};

// Whether the text is of the form of ManifestFile::hash.
bool is_manifest_hash(const std::string& text);

// The one text of a manifest: members and files sorted, indent 1, newline at the end. What the
// comments above demand must hold. Error(kLimit) where it would be larger than one is read.
std::string to_json(const Manifest& manifest);

// Takes only what to_json writes, byte for byte; anything else is an Error(kCorrupt), or kLimit for
// its length, that names `path`, the file the text comes from, and the entry at fault. Besides the
// text it takes at most twice as much memory, whatever the text is.
Manifest parse_manifest(const std::string& text, const std::string& path);

}  // namespace isoshard::checkpoint
