// Known upstream faults that a checkpoint proves by itself (docs/deepspeed_errata.md). Nothing is
// concluded from odd values: a rule speaks where the files contradict each other in the one way
// that its fault explains, and is silent otherwise.
//
// What it does not do: it is no verdict on the checkpoint (verify.h). Payloads stay unread unless
// DoctorOptions::payload is set, and what could not be looked for stands in Diagnosis::not_looked.
#pragma once

#include <string>
#include <vector>

#include "checkpoint/deepspeed/reader.h"
#include "reshard/other_tags.h"
#include "reshard/verify.h"

namespace isoshard::reshard {

enum class Grade {
  kProven,   // no other cause leaves these bytes
  kSuspect,  // an ordinary run could leave them, by a rare chance that `proof` names
};

const char* name(Grade grade);  // "PROVEN"

struct Symptom {
  std::string rule = {};  // "torn-publication"; see kDoctorRules
  Grade grade = Grade::kProven;
  Verdict verdict = Verdict::kCorrupt;  // what verify calls a checkpoint with it
  std::string file = {};                // path
  std::string entry = {};               // record, key, parameter or group; empty: the whole file
  std::string found = {};               // may have further lines
  std::string proof = {};               // why that can be nothing else
  std::string fault = {};               // whose, and the errata's row
  std::string safe = {};                // what is safe now
  std::string next = {};                // what to do next
};

struct DoctorOptions {
  checkpoint::ReadOptions read;
  bool payload = false;    // also compare masters with the model's copies
  bool other_tags = true;  // where this one cannot be read, also those beside it
};

struct Diagnosis {
  std::string folder;       // the tag or universal folder
  std::string description;  // form, topology, version; empty when it could not be read
  std::vector<Symptom> symptoms;
  std::vector<std::string> notices;
  std::vector<std::string> not_looked;  // "rule: reason"
  std::vector<OtherTag> other_tags;     // where this one cannot be read
};

// Name and one line of every rule, in the order in which they are asked.
struct DoctorRule {
  const char* name;
  const char* about;
};
inline constexpr DoctorRule kDoctorRules[] = {
    {"torn-publication", "latest, or files of the folder, are of a save that did not end"},
    {"stale-tail", "bytes of an older file lie behind a whole one, or between its two pieces"},
    {"missing-shards", "files that others of the checkpoint count on are not there"},
    {"code-in-folder", "a pickle calls a function that runs a program when loaded by Python"},
    {"rank-order", "ranks stand in the order of their digits: 10, 11, 9"},
    {"kept-padding", "a tensor still has the padding of stage 3"},
    {"zero-moments", "all moments of a group are zero after a step"},
    {"round-robin", "a universal form of round_robin_gradients with parameters swapped"},
    {"unexplained", "it cannot be read, and no rule says why"},
};

// Throws the Error of a source that is not there, not supported or may not be read.
Diagnosis examine(Storage& storage, const std::string& source, const DoctorOptions& options);

}  // namespace isoshard::reshard
