// isoshard doctor: known upstream faults that a checkpoint proves, and what commands left behind.
#include "reshard/doctor.h"

#include <algorithm>
#include <iostream>

#include "core/error.h"
#include "reshard/doctor_sweep.h"
#include "reshard/report_text.h"
#include "tools/session.h"

namespace isoshard::tools {
namespace {

using reshard::count_of;
using reshard::Diagnosis;
using reshard::Leftover;
using reshard::Symptom;

constexpr size_t kLabelWidth = 12;

struct DoctorFlags {
  std::string source;
  bool payload = false;
  bool clean = false;
  bool dry_run = false;
};

void print_part(const std::string& label, const std::string& text) {
  if (text.empty()) return;
  std::cout << "  " << label << std::string(kLabelWidth - label.size(), ' ')
            << reshard::moved_in(text, kLabelWidth + 2) << "\n";
}

void print_symptom(const Symptom& symptom) {
  std::cout << name(symptom.grade) << "  " << symptom.rule << "\n";
  print_part("file:", symptom.file.empty() ? "" : quote(symptom.file));
  print_part("entry:", symptom.entry);
  print_part("found:", symptom.found);
  print_part("proof:", symptom.proof);
  print_part("fault:", symptom.fault);
  print_part("safe now:", symptom.safe);
  print_part("next:", symptom.next);
}

reshard::Verdict worst_of(const Diagnosis& diagnosis) {
  reshard::Verdict worst = reshard::Verdict::kVerified;
  for (const Symptom& symptom : diagnosis.symptoms) worst = std::max(worst, symptom.verdict);
  return worst;
}

void print_text(const Session& session, const std::string& source, const Diagnosis& diagnosis) {
  const size_t count = diagnosis.symptoms.size();
  std::cout << (count == 0 ? "no known fault" : name(worst_of(diagnosis))) << "  " << source
            << "\n";
  if (session.quiet) return;
  for (const Symptom& symptom : diagnosis.symptoms) print_symptom(symptom);
  print_part("form", diagnosis.description);
  for (const std::string& text : diagnosis.notices) print_part("notice", text);
  for (const std::string& text : diagnosis.not_looked) print_part("not looked", text);
  print_part("other tags", reshard::tell(diagnosis.other_tags));
}

void print_diagnosis(const Session& session, const std::string& source,
                     const Diagnosis& diagnosis) {
  nlohmann::json object = {{"kind", "diagnosis"},
                           {"source", source},
                           {"folder", diagnosis.folder},
                           {"form", diagnosis.description},
                           {"notices", diagnosis.notices},
                           {"not_looked", diagnosis.not_looked},
                           {"other_tags", nlohmann::json::array()},
                           {"findings", nlohmann::json::array()}};
  for (const reshard::OtherTag& tag : diagnosis.other_tags) {
    const char* states[] = {"whole", "not whole", "not looked at"};
    object["other_tags"].push_back(
        {{"tag", tag.tag}, {"state", states[static_cast<int>(tag.state)]}, {"found", tag.found}});
  }
  object["verdict"] = nullptr;
  if (!diagnosis.symptoms.empty()) object["verdict"] = name(worst_of(diagnosis));
  for (const Symptom& symptom : diagnosis.symptoms) {
    object["findings"].push_back({{"rule", symptom.rule},
                                  {"grade", name(symptom.grade)},
                                  {"verdict", name(symptom.verdict)},
                                  {"file", symptom.file},
                                  {"entry", symptom.entry},
                                  {"found", symptom.found},
                                  {"proof", symptom.proof},
                                  {"fault", symptom.fault},
                                  {"safe", symptom.safe},
                                  {"next", symptom.next}});
  }
  session.print_json(object);
}

void examine(Session* session, const DoctorFlags& flags) {
  if (!session->also.empty()) session->storage.lay_over(flags.source, session->also);
  reshard::DoctorOptions options{.read = session->read, .payload = flags.payload};
  options.read.workers = session->stream_options().workers;
  const Diagnosis diagnosis = reshard::examine(session->storage, flags.source, options);
  if (!diagnosis.symptoms.empty()) session->status = kAnswerIsNo;
  if (session->json)
    print_diagnosis(*session, flags.source, diagnosis);
  else
    print_text(*session, flags.source, diagnosis);
}

void print_leftover(const Session& session, const Leftover& leftover) {
  if (session.json) {
    return session.print_json({{"kind", "leftover"},
                               {"what", name(leftover.kind)},
                               {"path", leftover.path},
                               {"files", leftover.files},
                               {"bytes", leftover.size_bytes},
                               {"quiet_seconds", leftover.quiet_seconds},
                               {"about", leftover.what},
                               {"removed", leftover.removed},
                               {"kept", leftover.kept}});
  }
  const char* word = leftover.removed ? "removed" : leftover.kept.empty() ? "dead" : "kept";
  std::cout << word << "  " << quote(leftover.path) << "\n";
  if (session.quiet) return;
  print_part("what", std::string(name(leftover.kind)) + ": " + leftover.what + "; " +
                         count_of(static_cast<size_t>(leftover.files), "file") + ", " +
                         human_bytes(leftover.size_bytes));
  print_part("kept", leftover.kept);
}

// Status 1 when something lies there still.
void sweep(Session* session, const DoctorFlags& flags) {
  std::vector<Leftover> list =
      reshard::find_leftovers(session->storage, flags.source, session->read.tag);
  for (Leftover& leftover : list) {
    if (!flags.dry_run) reshard::remove_leftover(session->storage, &leftover);
    if (!leftover.removed) session->status = kAnswerIsNo;
    print_leftover(*session, leftover);
  }
  if (list.empty()) session->say("nothing was left by an interrupted command");
}

void run_doctor(Session* session, const DoctorFlags& flags) {
  session->source = flags.source;
  if (flags.dry_run && !flags.clean) {
    throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                          .what = "--dry-run goes with --clean.",
                          .next = "leave --dry-run out: without --clean nothing is changed"});
  }
  flags.clean ? sweep(session, flags) : examine(session, flags);
}

}  // namespace

void add_doctor(CLI::App* app, Session* session) {
  auto flags = std::make_shared<DoctorFlags>();
  CLI::App* verb = app->add_subcommand(
      "doctor", "Known faults of other programs that the files prove; reads headers only");
  verb->add_option("CHECKPOINT", flags->source)->required();
  verb->add_flag("--payload", flags->payload,
                 "Also read weights: what only they show in a universal folder");
  verb->add_flag("--clean", flags->clean,
                 "Instead: list what interrupted commands of isoshard left, remove what is dead");
  verb->add_flag("--dry-run", flags->dry_run, "With --clean: remove nothing");
  add_source_flags(verb, session);
  verb->callback([session, flags] { run_doctor(session, *flags); });
}

}  // namespace isoshard::tools
