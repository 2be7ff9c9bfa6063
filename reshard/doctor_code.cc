// Code in a checkpoint: pickles that call it when Python loads them, and files that are code.
#include <algorithm>
#include <set>
#include <string_view>

#include "checkpoint/format/hostile_globals.h"
#include "core/error.h"
#include "reshard/doctor_rules.h"

namespace isoshard::reshard {
namespace {

constexpr const char* kFault =
    "DeepSpeed loads every file with weights_only=False, which runs what a pickle calls";

// Modules and functions that start a program or reach the network or disk at a call; their values,
// and what users' modules of the same names hold, the reader does not refuse. It refuses more:
// names such as operator.itemgetter, which an honest script may have stored.
bool starts_programs(const std::string& global) {
  const std::set<std::string_view> modules = {"os",     "posix",  "nt",       "subprocess",
                                              "pty",    "socket", "commands", "webbrowser",
                                              "ctypes", "runpy",  "pip",      "shutil"};
  const std::set<std::string_view> functions = {"eval", "exec",       "execfile",
                                                "open", "__import__", "compile"};
  const size_t blank = global.find(' ');
  const std::string_view module = std::string_view(global).substr(0, blank);
  const std::string_view function =
      blank == std::string::npos ? "" : std::string_view(global).substr(blank + 1);
  if (module == "builtins" || module == "__builtin__") return functions.contains(function);
  return modules.contains(module.substr(0, module.find('.')));
}

// The text between the quotes of `global "os system"`; empty for other refusals.
std::string global_in(const ErrorInfo& refusal) {
  const std::string_view begin = "global \"";
  const std::string& entry = refusal.entry;
  if (refusal.code != ErrorCode::kHostile || !entry.starts_with(begin)) return "";
  return entry.substr(begin.size(), entry.size() - begin.size() - 1);
}

// A name that is stored and not called runs nothing.
bool is_called(const ErrorInfo& refusal) { return refusal.found == checkpoint::kCalledGlobal; }

bool is_proven(const ErrorInfo& refusal) {
  return is_called(refusal) && starts_programs(global_in(refusal));
}

void tell(Patient* patient, const std::string& path, const ErrorInfo& refusal) {
  const std::string global = global_in(refusal);
  if (global.empty() || patient->has("code-in-folder", path)) return;
  const bool proven = is_proven(refusal), called = is_called(refusal);
  patient->result.symptoms.push_back(
      {.rule = "code-in-folder",
       .grade = proven ? Grade::kProven : Grade::kSuspect,
       .verdict = Verdict::kHostile,
       .file = path,
       .entry = refusal.entry,
       .found = called ? "data.pkl names a function that an ordinary unpickler calls"
                       : "data.pkl names a function or class, and no call of it",
       .proof = proven   ? "no training program stores a call of this function"
                : called ? "a script may have stored it without harm in mind; what it does is not "
                           "known here"
                         : "loading imports its module and calls nothing; a script may have stored "
                           "it without harm in mind",
       .fault = kFault,
       .safe = "this machine: isoshard runs no pickle; do not load the file with Python",
       .next = "find out who wrote the file, and use another copy"});
}

// Archives that the reader does not open, such as what a script has put beside them.
void look_at_others(Patient* patient, const std::string& folder) {
  std::set<std::string> known;
  if (patient->state) {
    for (const checkpoint::SourceFile& file : patient->state->files) known.insert(file.path);
  }
  for (const PatientFile& file : patient->files) known.insert(patient->path_of(file.relative));
  for (const DirectoryEntry& entry : patient->storage.list(folder)) {
    const std::string path = checkpoint::join(folder, entry.name);
    const bool archive =
        entry.name.ends_with(".pt") || entry.name.ends_with(".pth") || entry.name.ends_with(".bin");
    if (entry.kind != DirectoryEntry::Kind::kFile || !archive || known.contains(path)) continue;
    try {
      checkpoint::TorchFile(patient->storage, path);
    } catch (const Error& error) {
      if (is_proven(error.info()))
        tell(patient, path, error.info());
      else
        patient->pass_over("code-in-folder", error);
    }
  }
}

// DeepSpeed copies its recovery script beside `latest`, never among the files of the ranks.
void look_for_programs(Patient* patient) {
  for (const DirectoryEntry& entry : patient->storage.list(patient->place.folder)) {
    const bool code =
        std::ranges::any_of(std::initializer_list<const char*>{".py", ".pyc", ".so", ".sh"},
                            [&](const char* end) { return entry.name.ends_with(end); });
    if (!code || entry.kind != DirectoryEntry::Kind::kFile || entry.name == "zero_to_fp32.py")
      continue;
    patient->result.symptoms.push_back(
        {.rule = "code-in-folder",
         .grade = Grade::kSuspect,
         .verdict = Verdict::kSuspect,
         .file = patient->path_of(entry.name),
         .found = "a program among the files of the ranks",
         .proof = "DeepSpeed puts its recovery script beside latest and nothing else anywhere; a "
                  "person may have put this one here",
         .fault = "none of DeepSpeed's",
         .safe = "the checkpoint, as far as verify calls it good",
         .next = "look at it before anything runs it; isoshard does not"});
  }
}

}  // namespace

void look_for_code(Patient* patient) {
  for (const PatientFile& file : patient->files) {
    if (file.refusal) tell(patient, patient->path_of(file.relative), *file.refusal);
  }
  if (patient->refusal) tell(patient, patient->refusal->file, *patient->refusal);
  if (!patient->place.folder_named) return;
  look_at_others(patient, patient->place.folder);
  const std::string& save = patient->place.save_folder;
  if (!save.empty()) look_at_others(patient, save);
  if (patient->place.kind != checkpoint::SourcePlace::Kind::kWeights) look_for_programs(patient);
}

}  // namespace isoshard::reshard
