// Rules for a folder that the reader refuses: each file is judged by itself and against the others.
#include <algorithm>
#include <map>

#include "checkpoint/deepspeed/model_states.h"
#include "checkpoint/deepspeed/names.h"
#include "checkpoint/deepspeed/reader.h"
#include "checkpoint/deepspeed/zero_files.h"
#include "checkpoint/reading_view.h"
#include "core/error.h"
#include "core/zero_rules.h"
#include "reshard/doctor_rules.h"
#include "reshard/report_text.h"

namespace isoshard::reshard {
namespace {

using checkpoint::Fields;
using checkpoint::FileName;
using checkpoint::Kind;
using checkpoint::kNoNode;
using checkpoint::NodeId;
using checkpoint::ShardedState;

constexpr const char* kOlder = "an older checkpoint of the run, if verify calls it good";

FileName name_of(const PatientFile& file) {
  return checkpoint::parse_file_name(checkpoint::base_name(file.relative));
}

// One file as a state of its own, for the functions that read from states.
ShardedState state_of(const Patient& patient, const PatientFile& file) {
  ShardedState state;
  state.folder = patient.place.folder;
  state.files.push_back({patient.path_of(file.relative), file.relative, file.torch, nullptr});
  return state;
}

std::string bytes_of(int64_t count) { return count_of(static_cast<size_t>(count), "byte"); }

void tell_tail(Patient* patient, const PatientFile& file, int64_t whole, int64_t size_bytes,
               ArchiveTail tail) {
  const bool proven = tail == ArchiveTail::kInPlace;
  const std::string front = "the first part passes every check of an archive alone; ";
  std::string proof = "what else may have appended to it is not known";
  if (proven)
    proof =
        "the directory at the end counts from the file's own first byte: it is of an older, "
        "longer file that lay here and was not cut off when it was written over";
  else if (tail == ArchiveTail::kOther)
    proof =
        "the directory at the end does not count from the file's first byte, so that another "
        "archive may have been appended";
  patient->result.symptoms.push_back(
      {.rule = "stale-tail",
       .grade = proven ? Grade::kProven : Grade::kSuspect,
       .file = patient->path_of(file.relative),
       .found = "a whole archive of " + bytes_of(whole) + ", then " + bytes_of(size_bytes - whole) +
                (tail == ArchiveTail::kNone ? " that belong to no archive"
                                            : " that end in the end record of another archive"),
       .proof = front + proof,
       .fault = std::string("DeepSpeed's FastFileWriter opens a file without O_TRUNC") +
                (proven ? "" : "; or whatever has appended to it"),
       .safe = "the first " + bytes_of(whole) +
               (proven ? ": they are the newer file, whole" : ": they are an archive, whole"),
       .next = "copy them into a new file (head -c " + std::to_string(whole) +
               "), put it in this one's place, then isoshard verify"});
}

void tell_split(Patient* patient, const PatientFile& file, const SplitArchive& split,
                int64_t size_bytes) {
  const std::string front = std::to_string(split.front_bytes);
  const std::string back = std::to_string(split.back_bytes);
  const std::string between = bytes_of(size_bytes - split.front_bytes - split.back_bytes);
  patient->result.symptoms.push_back(
      {.rule = "stale-tail",
       .grade = split.older ? Grade::kProven : Grade::kSuspect,
       .file = patient->path_of(file.relative),
       .found = "the first " + front + " and the last " + back +
                " bytes are a whole archive; between them lie " + between +
                (split.older ? " of an older file" : ""),
       .proof =
           std::string("the end record counts as many bytes as the two pieces have; joined, they "
                       "pass every check of an archive, and each record fits its CRC") +
           (split.older ? "; what lies between them ends in the end record of another archive"
                        : "; whether an older file lies between them is not known"),
       .fault = std::string("DeepSpeed's FastFileWriter opens a file without O_TRUNC, and appends "
                            "what fills no block") +
                (split.older ? "" : "; or a copy that began again before its end"),
       .safe = "the two pieces: joined, they are a whole archive",
       .next = "join them in a new file (head -c " + front + ", then tail -c " + back +
               " behind it), put it in this one's place, then isoshard verify"});
}

void tell_torn(Patient* patient, const PatientFile& file, const std::string& found,
               const std::string& proof) {
  patient->result.symptoms.push_back({.rule = "torn-publication",
                                      .verdict = Verdict::kIncomplete,
                                      .file = patient->path_of(file.relative),
                                      .found = found,
                                      .proof = proof,
                                      .fault = kTornFault,
                                      .safe = kOlder,
                                      .next = "load an older tag (--tag); this file is lost unless "
                                              "another node has kept it"});
}

// The longest whole file of the same kind, for comparison.
std::string sister_of(const Patient& patient, const PatientFile& file) {
  const PatientFile* longest = nullptr;
  for (const PatientFile& other : patient.files) {
    if (!other.torch || name_of(other).kind != name_of(file).kind) continue;
    if (longest == nullptr ||
        other.torch->file().size_bytes() > longest->torch->file().size_bytes())
      longest = &other;
  }
  if (longest == nullptr) return "";
  return "; " + quote(longest->relative) + " has " + bytes_of(longest->torch->file().size_bytes());
}

void judge_bytes(Patient* patient, const PatientFile& file) {
  constexpr int64_t kBlock = 4096;
  const auto opened = patient->storage.open_read(patient->path_of(file.relative));
  const int64_t size_bytes = opened->size_bytes();
  const auto block = static_cast<size_t>(std::min(size_bytes, kBlock));
  std::string head(block, '\0'), tail(block, '\0');
  opened->read_at(0, std::as_writable_bytes(std::span(head)));
  opened->read_at(size_bytes - static_cast<int64_t>(block),
                  std::as_writable_bytes(std::span(tail)));
  const std::string size_text = bytes_of(size_bytes) + sister_of(*patient, file);
  const auto empty = [](const std::string& text) {
    return text.find_first_not_of('\0') == text.npos;
  };
  if (size_bytes == 0)
    return tell_torn(patient, file, size_text, "torch.save leaves no empty file when it ends");
  if (empty(head) || (empty(tail) && size_bytes > kBlock)) {
    return tell_torn(patient, file,
                     size_text + (empty(head) ? "; it begins with zeros" : "; it ends in zeros"),
                     "an archive begins with PK and ends in its end record: blocks of it never "
                     "reached the disk");
  }
  if (!std::string("PK\x03\x04").starts_with(head.substr(0, 4))) return;  // no archive of torch
  if (size_bytes < 4)
    return tell_torn(patient, file, size_text, "an archive has at least 22 bytes");
  if (const std::optional<SplitArchive> split = split_archive(*opened))
    return tell_split(patient, file, *split, size_bytes);
  const ArchiveFront front = archive_front(*opened);
  const ArchiveTail behind = archive_tail(*opened, front.whole_bytes.value_or(0));
  if (front.whole_bytes && *front.whole_bytes < size_bytes)
    return tell_tail(patient, file, *front.whole_bytes, size_bytes, behind);
  if (behind != ArchiveTail::kNone || !front.cut_short) return;
  tell_torn(patient, file, size_text + "; it begins as an archive and has no end record",
            "its records, followed from the front, go on behind the file's end");
}

// Of an optimizer file: "state[0] step" → text; of a model file: its counter.
std::map<std::string, std::string> steps_of(const Patient& patient, const PatientFile& file) {
  std::map<std::string, std::string> steps;
  const ShardedState state = state_of(patient, file);
  const Fields f(*file.torch);
  const FileName::Kind kind = name_of(file).kind;
  if (kind == FileName::Kind::kModel || kind == FileName::Kind::kModelOfRank) {
    const NodeId node = f.maybe(f.root(), "global_steps");
    if (node != kNoNode) steps["global_steps"] = checkpoint::scalar_text(state, {0, node});
  }
  if (kind != FileName::Kind::kOptim) return steps;
  const NodeId optimizer = f.need(f.root(), "optimizer_state_dict");
  NodeId base = f.maybe(optimizer, "base_optimizer_state");
  if (base == kNoNode) base = f.need(optimizer, "optimizer_state_dict");
  const std::vector<NodeId>& entries = f.pickle().entries(f.need(base, "state"));
  for (size_t i = 0; i + 1 < entries.size(); i += 2) {
    const NodeId step = f.maybe(entries[i + 1], "step");
    if (step == kNoNode) continue;
    steps["state[" + std::to_string(f.integer(entries[i], "state key")) + "] step"] =
        checkpoint::scalar_text(state, {0, step});
  }
  return steps;
}

// Under other names.
class Renamed final : public checkpoint::ReadingView {
 public:
  Renamed(Storage& storage, std::map<std::string, std::string> names)
      : ReadingView(storage), names_(std::move(names)) {}
  std::unique_ptr<ReadableFile> open_read(const std::string& path) override {
    const auto found = names_.find(path);
    return base_.open_read(found == names_.end() ? path : found->second);
  }

 private:
  std::map<std::string, std::string> names_;  // asked → there
};

bool reads(Patient* patient, Storage& storage, bool allow_renamed) {
  checkpoint::ReadOptions read = patient->options.read;
  read.prove = false;
  read.allow_renamed = allow_renamed;
  try {
    checkpoint::read_checkpoint(storage, patient->source, read);
    return true;
  } catch (const Error& error) {
    if (error.info().code == ErrorCode::kInterrupted) throw;
    return false;
  }
}

// Names of one kind by mp rank and rank.
std::map<int, std::map<int, std::string>> ranks_of(const Patient& patient, FileName::Kind kind) {
  std::map<int, std::map<int, std::string>> ranks;
  for (const PatientFile& file : patient.files) {
    const FileName name = name_of(file);
    if (name.kind == kind) ranks[name.mp][name.dp] = patient.path_of(file.relative);
  }
  return ranks;
}

// Rank r asks for the file of rank order[r], or the other way round.
std::map<std::string, std::string> reordered(const Patient& patient, FileName::Kind kind,
                                             int digits, bool backwards) {
  std::map<std::string, std::string> names;
  for (const auto& [mp, files] : ranks_of(patient, kind)) {
    const int count = static_cast<int>(files.size());
    if (files.rbegin()->first != count - 1) continue;
    const std::vector<int> order = alphabetical_ranks(count, digits);
    for (int rank = 0; rank < count; ++rank) {
      const int other = order[static_cast<size_t>(rank)];
      if (rank == other) continue;
      if (backwards)
        names[files.at(other)] = files.at(rank);
      else
        names[files.at(rank)] = files.at(other);
    }
  }
  return names;
}

void tell_order(Patient* patient, const std::map<std::string, std::string>& names,
                const std::string& proof) {
  std::vector<std::string> details;
  for (const auto& [asked, there] : names)
    details.push_back(quote(checkpoint::base_name(there)) + " holds what belongs into " +
                      quote(checkpoint::base_name(asked)));
  patient->result.symptoms.push_back(
      {.rule = "rank-order",
       .file = patient->place.folder,
       .found = with_details(count_of(names.size(), "file") +
                                 " of ranks in the order of their names as text: 0, 1, 10, 11, 2",
                             details),
       .proof = proof,
       .fault = "DeepSpeed issues 5283, 5342, 5395: files or fragments sorted as text",
       .safe = "all data: only the names are wrong",
       .next = "rename the files as listed (--json lists all), then isoshard verify"});
}

}  // namespace

void look_for_torn_files(Patient* patient) {
  for (const PatientFile& file : patient->files) {
    if (!file.refusal) continue;
    const ErrorCode code = file.refusal->code;
    if (code == ErrorCode::kCorrupt || code == ErrorCode::kIncomplete) judge_bytes(patient, file);
  }
}

// Which counts must be equal: global_steps on all ranks; the step of an optimizer's state of one
// number on the ranks of one mp rank and, where these are tensor-parallel ranks, on all. In a
// pipeline each stage has groups of its own, so that one number may mean a group that joined later.
void look_for_mixed_steps(Patient* patient) {
  const bool pipeline = std::ranges::any_of(patient->files, [](const PatientFile& file) {
    return name_of(file).kind == FileName::Kind::kLayer;
  });
  std::map<std::string, std::map<std::string, std::vector<std::string>>> found;  // key, value, who
  for (const PatientFile& file : patient->files) {
    if (!file.torch) continue;
    try {
      for (const auto& [key, value] : steps_of(*patient, file)) {
        const bool own = pipeline && key != "global_steps";
        const std::string of = own ? " of mp rank " + std::to_string(name_of(file).mp) : "";
        found[key + of][value].push_back(quote(file.relative));
      }
    } catch (const Error& error) {
      patient->pass_over("torn-publication", error);
    }
  }
  for (const auto& [key, values] : found) {
    if (values.size() < 2) continue;
    std::vector<std::string> details;
    for (const auto& [value, files] : values)
      details.push_back(value + " in " + count_of(files.size(), "file") + ", as in " + files[0]);
    return patient->result.symptoms.push_back(
        {.rule = "torn-publication",
         .file = patient->place.folder,
         .entry = key,
         .found = with_details("files of several steps in one folder", details),
         .proof = "all ranks of a save stand at one step: these are files of two saves",
         .fault = kTornFault,
         .safe = kOlder,
         .next = "load an older tag, or bring the missing files of one step from where they are"});
  }
}

void look_for_missing_shards(Patient* patient) {
  const ErrorInfo& info = *patient->refusal;
  const bool absent = info.code == ErrorCode::kIncomplete || info.code == ErrorCode::kNotFound;
  const bool of_file = std::ranges::any_of(patient->files, [&](const PatientFile& file) {
    return file.refusal && patient->path_of(file.relative) == info.file;
  });
  const bool marked = patient->has("torn-publication", patient->place.folder);
  if (!absent || of_file || marked) return;
  patient->result.symptoms.push_back(
      {.rule = "missing-shards",
       .verdict = Verdict::kIncomplete,
       .file = info.file,
       .entry = info.entry,
       .found = info.what + (info.found.empty() ? "" : "\n" + info.found),
       .proof =
           "the files that are there ask for " + (info.expected.empty() ? "it" : info.expected),
       .fault = "DeepSpeed's tools join what they find (errata 25): a rank's file that was not "
                "copied, or a fragment that was lost, goes unnoticed",
       .safe = "what is there, as far as verify calls each file good",
       .next = info.next});
}

void look_for_renamed_ranks(Patient* patient) {
  const ErrorCode code = patient->refusal->code;
  if (code != ErrorCode::kMismatch && code != ErrorCode::kCorrupt) return;
  const bool stage3 = !ranks_of(*patient, FileName::Kind::kModelOfRank).empty();
  for (int digits : {1, 2}) {
    for (bool backwards : {false, true}) {
      std::map<std::string, std::string> names =
          reordered(*patient, FileName::Kind::kOptim, digits, backwards);
      if (names.empty()) continue;
      std::vector<std::map<std::string, std::string>> tries = {names};
      if (stage3) {
        names.merge(reordered(*patient, FileName::Kind::kModelOfRank, digits, backwards));
        tries.push_back(names);
      }
      for (const std::map<std::string, std::string>& attempt : tries) {
        Renamed view(patient->storage, attempt);
        if (reads(patient, view, false))
          return tell_order(patient, attempt,
                            "every archive says under which name it was saved, and all are right "
                            "in that order");
        if (!stage3 && !reads(patient, patient->storage, true) && reads(patient, view, true))
          return tell_order(patient, attempt,
                            "the slice maps and paddings of all ranks fit the parameter shapes in "
                            "that order, and do not in the one found");
      }
    }
  }
}

void look_for_padding(Patient* patient) {
  if (patient->place.kind != checkpoint::SourcePlace::Kind::kUniversal) return;
  const auto first = std::ranges::find_if(patient->files, [](const PatientFile& file) {
    return file.torch && name_of(file).kind == FileName::Kind::kModelOfRank &&
           name_of(file).dp == 0;
  });
  if (first == patient->files.end()) return;
  const checkpoint::ModelStates model =
      checkpoint::read_model_states(state_of(*patient, *first), 0);
  const auto files = ranks_of(*patient, FileName::Kind::kModelOfRank);
  std::map<std::string, int64_t> numels;
  for (const checkpoint::NamedShapes& group : model.param_shapes) {
    for (const auto& [name, shape] : group) numels[name] = numel(shape);
  }
  std::vector<std::string> details;
  for (const PatientFile& file : patient->files) {
    if (!file.torch || !file.relative.starts_with("zero/")) continue;
    const std::string inner = file.relative.substr(5);
    const auto expected = numels.find(inner.substr(0, inner.rfind('/')));
    const auto view = file.torch->tensor(file.torch->pickle().root);
    if (expected == numels.end() || !view || view->shape.size() != 1) continue;
    const int64_t found = view->shape[0];
    for (int64_t ranks : {model.dp_world, static_cast<int64_t>(files.begin()->second.size())}) {
      const int dp = static_cast<int>(ranks);
      if (dp < 1 || found == expected->second || found != dp * slot_size(expected->second, dp))
        continue;
      details.push_back(quote(file.relative) + ": " + std::to_string(found) + " elements, " +
                        std::to_string(dp) + " slots of " +
                        std::to_string(slot_size(expected->second, dp)) + "; the parameter has " +
                        std::to_string(expected->second));
      break;
    }
  }
  if (details.empty()) return;
  patient->result.symptoms.push_back(
      {.rule = "kept-padding",
       .file = patient->path_of("zero"),
       .found = with_details(count_of(details.size(), "tensor") + " with padding", details),
       .proof = "each is longer than param_shapes says by exactly what the slots of all ranks have "
                "too much",
       .fault = "DeepSpeed before 0.19 keeps it (errata 45)",
       .safe = "the elements before the padding; the source checkpoint",
       .next = "convert the source checkpoint again with isoshard"});
}

}  // namespace isoshard::reshard
