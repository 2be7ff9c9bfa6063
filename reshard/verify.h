// One word on a checkpoint, with the evidence for it (docs/CONTRACTS.md §5). Everything is read
// once: every record's CRC, every hash of a manifest, the digest, and whatever is stored twice.
//
// What it does not verify stands in Verification::not_verified, case by case.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "checkpoint/deepspeed/reader.h"
#include "reshard/copies.h"
#include "reshard/deep_reading.h"
#include "reshard/digest.h"
#include "reshard/replicas.h"

namespace isoshard::reshard {

// From the best to the worst.
enum class Verdict { kVerified, kComplete, kSuspect, kIncomplete, kCorrupt, kHostile };

const char* name(Verdict verdict);  // "VERIFIED"

// The verdict that an error means; nothing for errors that leave the question open.
std::optional<Verdict> verdict_of(ErrorCode code);

// Why a verdict is not better; at most one paragraph, lines after the first are details.
struct Finding {
  Verdict verdict = Verdict::kSuspect;
  std::string text;
};

struct Verification {
  Verdict verdict = Verdict::kComplete;
  std::string folder;       // the tag or universal folder, or that of the weights
  std::string description;  // form, topology, version; empty when it could not be read
  int64_t files = 0;        // opened
  int64_t bytes_read = 0;   // in the one pass over all files
  int64_t records = 0;      // of zip archives, each with the right CRC
  bool read_whole = false;  // the pass came to its end
  CopyReport copies;
  std::optional<ReplicaReport> replicas;  // --replicas
  std::optional<DeepReading> deep;        // --deep
  std::optional<Digest> digest;
  std::string manifest;     // what became of the manifest
  std::string certificate;  // and of the certificate; empty when there is none
  std::vector<Finding> findings;
  std::vector<std::string> notices;
  std::vector<std::string> inferred;
  std::vector<std::string> not_verified;
};

struct VerifyOptions {
  bool replicas = false;  // copy by copy: who differs
  bool deep = false;      // everything read from the disk, twice
  checkpoint::ReadOptions read;
  StreamOptions stream;
};

// Errors about the checkpoint become findings; an Error that says that it could not be judged
// (usage, unsupported, permission, unreadable, interrupted, nothing there) is thrown.
Verification verify(Storage& storage, const std::string& source, const VerifyOptions& options);

}  // namespace isoshard::reshard
