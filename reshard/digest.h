// iso1: one value for one state, whatever its topology, format and files (docs/formats/digest.md).
#pragma once

#include <string>
#include <vector>

#include "reshard/executor.h"

namespace isoshard::reshard {

struct LeafLine {
  std::string name;
  std::string state;  // "weight", "buffer", "exp_avg", …
  DType dtype = DType::kFloat32;
  Shape shape;
  LeafCrc crc;
  bool operator==(const LeafLine&) const = default;
};

struct SectionDigest {
  std::string section;  // "weights", "exp_avg", …, "steps", "buffers", "hyper"
  std::string hex;      // 64 digits; empty when absent
  std::string absent;   // the reason; empty when present
  int64_t tensors = 0;
  int64_t elements = 0;
};

struct Digest {
  std::string root;  // 64 hexadecimal digits over the sections present
  std::vector<SectionDigest> sections;
  std::vector<LeafLine> leaves;  // sorted by (name, state)
};

// Leaves whose CRCs a digest needs: weights, optimizer states, buffers; no copies.
enum class Sections { kAll, kWeightsAndBuffers };
std::vector<int> digested_leaves(const checkpoint::ShardedState& state,
                                 Sections sections = Sections::kAll);

// From the CRCs of those leaves. A section with a leaf whose CRC is not known is absent: kNotRead.
constexpr const char* kNotRead = "not read";
Digest make_digest(const checkpoint::ShardedState& state, const std::vector<LeafCrc>& crcs);

// Reads the payloads and makes the digest.
Digest compute_digest(Storage& storage, const checkpoint::ShardedState& state,
                      const StreamOptions& options);

// The canonical line of a leaf, as it goes into its section's SHA-256.
std::string leaf_line(const LeafLine& leaf);

// True when the root or a section is `expected`: 64 hexadecimal digits, with or without "iso1:".
bool has_digest(const Digest& digest, const std::string& expected);

// What a certificate says of a section: "iso1:<hex>", or "absent: <why>".
std::string stated(const SectionDigest& section);

const SectionDigest* find_section(const Digest& digest, const std::string& section);

}  // namespace isoshard::reshard
