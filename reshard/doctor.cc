// See doctor.h. Link 8 of the tensor's journey: what made it ill, where the bytes themselves say
// so.
#include "reshard/doctor.h"

#include <algorithm>

#include "checkpoint/cancel.h"
#include "checkpoint/publication.h"
#include "core/error.h"
#include "reshard/doctor_rules.h"
#include "reshard/parallel.h"

namespace isoshard::reshard {
namespace {

using checkpoint::Flavour;

// Errors that leave open what the checkpoint is.
bool leaves_open(ErrorCode code) { return !verdict_of(code); }

std::string told(const ErrorInfo& info) {
  std::string text = info.what;
  if (!info.expected.empty()) text += "\nexpected: " + info.expected;
  if (!info.found.empty()) text += "\nfound: " + info.found;
  return text;
}

void tell_unexplained(Patient* patient, const ErrorInfo& info) {
  patient->result.symptoms.push_back({.rule = "unexplained",
                                      .grade = Grade::kSuspect,
                                      .verdict = verdict_of(info.code).value_or(Verdict::kCorrupt),
                                      .file = info.file,
                                      .entry = info.entry,
                                      .found = told(info),
                                      .proof = "the file contradicts itself or another one",
                                      .fault = "no fault of the list leaves this",
                                      .safe = "other checkpoints of the run",
                                      .next = info.next});
}

// The hidden folder in which a command of isoshard was making the tag; empty if there is none.
std::string staging_of(Patient* patient, const std::string& tag) {
  const std::string begin = "." + tag + ".isoshard-";
  for (const DirectoryEntry& entry : patient->storage.list(patient->source)) {
    if (entry.kind == DirectoryEntry::Kind::kDirectory && entry.name.starts_with(begin))
      return entry.name;
  }
  return "";
}

// A pointer that leads nowhere. Tags are deleted by hand every day, so that this alone proves
// nothing.
void tell_pointer(Patient* patient, const std::string& name, const ErrorInfo& info) {
  const std::string path = checkpoint::join(patient->source, name);
  const bool empty = patient->storage.open_read(path)->size_bytes() == 0;
  const std::string tag = checkpoint::pointer_text(patient->storage, path);
  const bool zeros = !tag.empty() && tag.find_first_not_of('\0') == tag.npos;
  const std::string staging = tag.empty() ? "" : staging_of(patient, tag);
  std::string proof =
      "a pointer that names no folder was cut off while it was written, or written before its "
      "folder; or somebody has deleted the folder, or written the pointer";
  if (empty)
    proof = "a tag is written into the pointer by one write; what is empty was cut off before it";
  if (zeros)
    proof = "a pointer of zeros is a file whose size reached the disk and whose text did not";
  if (!staging.empty())
    proof = "the folder in which the tag was being made, " + quote(staging) + ", is still there";
  patient->result.symptoms.push_back(
      {.rule = "torn-publication",
       .grade = empty || zeros || !staging.empty() ? Grade::kProven : Grade::kSuspect,
       .verdict = Verdict::kIncomplete,
       .file = path,
       .found = told(info),
       .proof = proof,
       .fault = staging.empty() ? kTornFault
                                : "none of DeepSpeed's: a command of isoshard did not come to its "
                                  "end, or a copy of its folder did not",
       .safe = "the other tags of the folder, each by --tag",
       .next = info.next});
}

// False when what the pointer names is not there. A source that is not there at all is the
// caller's mistake.
bool find_place(Patient* patient) {
  const std::string& tag = patient->options.read.tag;
  checkpoint::require_source(patient->storage, patient->source, tag);
  try {
    patient->place = checkpoint::resolve_source(patient->storage, patient->source, tag);
    patient->result.folder = patient->place.folder;
    return true;
  } catch (const Error& error) {
    const ErrorInfo& info = error.info();
    if (!tag.empty() || leaves_open(info.code)) throw;
    patient->source = save_folder_of(patient->storage, patient->source);
    if (patient->source.empty()) throw;
    const bool latest = patient->storage.is_file(checkpoint::join(patient->source, "latest"));
    const std::string name = latest ? "latest" : "latest_universal";
    if (verdict_of(info.code) == Verdict::kHostile) {  // no tag, and no cut makes one of a tag
      tell_unexplained(patient, info);
      return false;
    }
    tell_pointer(patient, name, info);
    return false;
  }
}

// The commit marker of a folder of isoshard's own.
void look_for_marks(Patient* patient) {
  const std::string& folder = patient->place.folder;
  if (!patient->place.folder_named) return;
  const auto has = [&](const char* name) {
    return patient->storage.is_file(patient->path_of(name));
  };
  const bool mark = checkpoint::is_unfinished(patient->storage, folder);
  const bool lacks = has("certificate.json") && !has("MANIFEST.json");
  if (!mark && !lacks) return;
  patient->result.symptoms.push_back(
      {.rule = "torn-publication",
       .verdict = Verdict::kIncomplete,
       .file = folder,
       .found = mark ? "the mark of a command of isoshard that did not come to its end"
                     : "certificate.json without MANIFEST.json",
       .proof = mark ? "the mark is removed last"
                     : "isoshard writes the manifest last, into every folder with a certificate",
       .fault = "none of DeepSpeed's: a command of isoshard, or a copy of its folder, was cut off",
       .safe = "the source of that command",
       .next = "give the command again with another target, or copy the folder again"});
}

void describe(Patient* patient) {
  const checkpoint::ShardedState& state = *patient->state;
  std::string& text = patient->result.description;
  text = checkpoint::name(state.flavour);
  if (state.flavour == Flavour::kWeights) return;
  text += ", " + to_string(state.topology) + ", tag " + quote(state.tag);
  if (!state.version.empty()) text += ", DeepSpeed " + quote(state.version);
}

// The archives of a tag folder, those below zero/ of a universal one, or the files of weights.
void list_files(Patient* patient, const std::string& inside, int depth) {
  constexpr int kDeepest = 64;
  const bool deep = patient->place.kind == checkpoint::SourcePlace::Kind::kUniversal;
  const std::string folder = inside.empty() ? patient->place.folder : patient->path_of(inside);
  for (const DirectoryEntry& entry : patient->storage.list(folder)) {
    const std::string relative = inside.empty() ? entry.name : inside + "/" + entry.name;
    if (entry.kind == DirectoryEntry::Kind::kDirectory) {
      if (deep && depth < kDeepest) list_files(patient, relative, depth + 1);
    } else if (entry.kind == DirectoryEntry::Kind::kFile && relative.ends_with(".pt")) {
      patient->files.push_back({relative, nullptr, std::nullopt});
    }
  }
}

// Every archive by itself, so that one that cannot be read does not hide the others.
void open_each(Patient* patient) {
  if (patient->place.kind == checkpoint::SourcePlace::Kind::kWeights) {
    for (const std::string& name : patient->place.files)
      patient->files.push_back({name, nullptr, std::nullopt});
  } else {
    list_files(patient, "", 0);
  }
  checkpoint::PickleShelf shelf;
  parallel_for(patient->files.size(), patient->options.read.workers, [&](size_t i) {
    checkpoint::throw_if_cancelled();
    PatientFile& file = patient->files[i];
    try {
      file.torch = std::make_shared<checkpoint::TorchFile>(patient->storage,
                                                           patient->path_of(file.relative), &shelf);
    } catch (const Error& error) {
      if (error.info().code == ErrorCode::kInterrupted) throw;
      file.refusal = error.info();
    }
  });
}

void read(Patient* patient) {
  checkpoint::ReadOptions read = patient->options.read;
  read.prove = false;
  try {
    patient->state = checkpoint::read_checkpoint(patient->storage, patient->source, read);
    patient->result.notices = patient->state->notices;
    describe(patient);
  } catch (const Error& error) {
    const ErrorCode code = error.info().code;
    if (leaves_open(code) && code != ErrorCode::kUnsupported) throw;
    patient->refusal = error.info();
  }
}

// A file that a rule cannot read further is no reason to stop: the refusal is told in any case.
template <typename Work>
void judging(Patient* patient, const char* rules, const Work& work) {
  try {
    work();
  } catch (const Error& error) {
    patient->pass_over(rules, error);
  }
}

// Whether a symptom says why a file is refused, or the folder where none is named.
bool explains(const Symptom& symptom, const std::string& refused, const std::string& folder) {
  if (symptom.file == refused) return true;
  if (symptom.rule == "code-in-folder") return false;
  return refused.empty() || refused == folder || symptom.file == folder ||
         symptom.rule == "missing-shards" || symptom.rule == "rank-order" ||
         symptom.rule == "kept-padding";
}

void look_at_files(Patient* patient) {
  judging(patient, "torn-publication, stale-tail", [&] { look_for_torn_files(patient); });
  look_for_mixed_steps(patient);
  look_for_missing_shards(patient);
  look_for_renamed_ranks(patient);
  judging(patient, "kept-padding", [&] { look_for_padding(patient); });
  patient->result.not_looked.push_back(
      "zero-moments, round-robin: the checkpoint cannot be read as a whole");
  const ErrorInfo& info = *patient->refusal;
  const bool explained = std::ranges::any_of(patient->result.symptoms, [&](const Symptom& symptom) {
    return explains(symptom, info.file, patient->result.folder);
  });
  if (explained) return;
  if (leaves_open(info.code)) throw Error(info);
  tell_unexplained(patient, info);
}

void look_at_state(Patient* patient) {
  look_for_missing_model_files(patient);
  look_for_missing_weights(patient);
  look_for_zero_moments(patient);
  if (patient->options.payload) {
    look_for_swapped_values(patient);
  } else if (patient->place.kind == checkpoint::SourcePlace::Kind::kUniversal) {
    patient->result.not_looked.push_back(
        "round-robin, rank-order: only payloads show them in a universal folder (--payload)");
  }
}

size_t place_of(const Symptom& symptom) {
  return static_cast<size_t>(
      std::ranges::find(kDoctorRules, symptom.rule,
                        [](const DoctorRule& r) { return std::string(r.name); }) -
      std::begin(kDoctorRules));
}

// What to go on from, where this tag is lost.
void look_for_other_tags(Patient* patient) {
  const auto lost = [](const Symptom& symptom) { return symptom.verdict >= Verdict::kIncomplete; };
  if (!patient->options.other_tags || std::ranges::none_of(patient->result.symptoms, lost)) return;
  const bool found = !patient->place.folder.empty();
  const std::string folder = found ? patient->place.save_folder : patient->source;
  if (folder.empty()) return;
  patient->result.other_tags =
      other_tags(patient->storage, folder, patient->place.tag, patient->options.read);
}

}  // namespace

const char* name(Grade grade) { return grade == Grade::kProven ? "PROVEN" : "SUSPECT"; }

bool Patient::has(const std::string& rule, const std::string& file) const {
  return std::ranges::any_of(result.symptoms, [&](const Symptom& symptom) {
    return symptom.rule == rule && (file.empty() || symptom.file == file);
  });
}

void Patient::pass_over(const std::string& rules, const Error& error) {
  const ErrorInfo& info = error.info();
  if (info.code == ErrorCode::kInterrupted) throw;
  const std::string where = (info.file.empty() ? "" : quote(info.file) + ": ") + info.what;
  result.not_looked.push_back(rules + ": " + where +
                              (info.entry.empty() ? "" : " (" + info.entry + ")"));
}

std::vector<int> alphabetical_ranks(int count, int digits) {
  const auto text = [&](int rank) {
    const std::string plain = std::to_string(rank);
    const auto width = static_cast<size_t>(digits);
    return plain.size() < width ? std::string(width - plain.size(), '0') + plain : plain;
  };
  std::vector<int> ranks;
  for (int rank = 0; rank < count; ++rank) ranks.push_back(rank);
  std::ranges::sort(ranks, {}, text);
  return ranks;
}

Diagnosis examine(Storage& storage, const std::string& source, const DoctorOptions& options) {
  Patient patient{.storage = storage, .source = source, .options = options};
  if (find_place(&patient)) {
    look_for_marks(&patient);
    read(&patient);
    if (!patient.state && patient.place.folder_named) open_each(&patient);
    look_for_code(&patient);
    patient.state ? look_at_state(&patient) : look_at_files(&patient);
  }
  look_for_other_tags(&patient);
  std::ranges::stable_sort(patient.result.symptoms, {}, place_of);
  return std::move(patient.result);
}

}  // namespace isoshard::reshard
