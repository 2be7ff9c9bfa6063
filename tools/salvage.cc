// isoshard salvage: what verifies of a damaged checkpoint as safetensors, and a list of the rest.
#include "reshard/salvage.h"

#include "checkpoint/deepspeed/weights_blueprint.h"
#include "core/error.h"
#include "reshard/plan.h"
#include "tools/conversion.h"
#include "tools/session.h"
#include "tools/version.h"

namespace isoshard::tools {
namespace {

using reshard::Salvage;
using reshard::SalvagedTensor;
using Status = SalvagedTensor::Status;

struct SalvageFlags {
  std::string source, target, max_shard_size = "5GB";
  bool partial = false;
  bool overwrite = false;
  bool dry_run = false;
};

constexpr size_t kShown = 40;  // lines of one list; salvage.json has all

void say_files(Session* session, const Salvage& salvage) {
  size_t shown = 0;
  for (const reshard::SurveyedFile& file : salvage.files) {
    if (file.why.empty() || ++shown > kShown) continue;
    session->say("  " + std::string(name(file.health)) + "  " + quote(file.name) + ": " + file.why);
  }
  if (shown > kShown) session->say("  … and " + std::to_string(shown - kShown) + " more files");
}

void say_tensors(Session* session, const Salvage& salvage) {
  size_t shown = 0;
  for (const SalvagedTensor& tensor : salvage.tensors) {
    if (tensor.status == Status::kExported && tensor.from.empty()) continue;
    if (++shown > kShown) continue;
    std::string line = "  " + std::string(name(tensor.status)) + "  " + quote(tensor.name) + " " +
                       quote(tensor.state) + " " + to_string(tensor.shape);
    if (!tensor.from.empty()) line += ", from " + tensor.from;
    if (!tensor.lost.empty()) {
      int64_t elements = 0;
      for (const reshard::LostRange& range : tensor.lost) elements += range.count;
      line += ": " + std::to_string(elements) + " elements lost, first " +
              std::to_string(tensor.lost[0].begin) + " to " +
              std::to_string(tensor.lost[0].begin + tensor.lost[0].count - 1) + ", in " +
              quote(tensor.lost[0].file) + ", " + tensor.lost[0].why;
    }
    session->say(line);
  }
  if (shown > kShown)
    session->say("  … and " + std::to_string(shown - kShown) + " more in salvage.json");
}

void say_result(Session* session, const Salvage& salvage) {
  say_files(session, salvage);
  say_tensors(session, salvage);
  for (const reshard::SalvagedNumber& number : salvage.numbers) {
    if (!number.proven)
      session->say("  lost  " + quote(number.name) + " of group " + std::to_string(number.group) +
                   " in its own file; another rank, or nothing, says " + number.value);
  }
  for (const std::string& text : salvage.disagreements) session->say("  doubtful  " + text);
  session->say("exported " + std::to_string(salvage.count(Status::kExported)) + ", copy " +
               std::to_string(salvage.count(Status::kCopy)) + ", partial " +
               std::to_string(salvage.count(Status::kPartial)) + ", lost " +
               std::to_string(salvage.count(Status::kLost)) + " of " +
               std::to_string(salvage.tensors.size()) + " tensors");
}

void run_salvage(Session* session, const SalvageFlags& flags) {
  refuse_overlap(session, flags.source, flags.target);
  if (!session->also.empty()) session->storage.lay_over(flags.source, session->also);
  session->source = flags.source;
  reshard::SalvageOptions options{.target = flags.target,
                                  .overwrite = flags.overwrite,
                                  .max_shard_bytes = checkpoint::parse_size(flags.max_shard_size),
                                  .program = program_version(),
                                  .stream = session->stream_options()};
  while (options.target.size() > 1 && options.target.back() == '/') options.target.pop_back();
  checkpoint::ReadOptions read = session->read;
  read.workers = options.stream.workers;
  Salvage salvage = reshard::take_stock(session->storage, flags.source, read, flags.partial);
  std::vector<checkpoint::FileBlueprint> files =
      reshard::salvage_files(&salvage, options.max_shard_bytes);
  if (files.empty() && !flags.dry_run)
    throw Error(ErrorInfo{.code = ErrorCode::kCorrupt,
                          .what = "Nothing can be salvaged: no tensor is whole.",
                          .file = salvage.state.folder,
                          .found = salvage.tensors.empty() || salvage.tensors[0].lost.empty()
                                       ? "no tensors"
                                       : salvage.tensors[0].lost[0].why,
                          .safe = "the source was only read; nothing was written",
                          .next = "--partial takes tensors that are good in part; salvage "
                                  "--dry-run lists what is lost"});
  const reshard::ReshardPlan plan = reshard::make_plan(salvage.state, std::move(files));
  if (!flags.dry_run) {
    check_space(session, plan, options.target);
    reshard::write_salvage(session->storage, salvage, plan, options);
  }
  nlohmann::json report = reshard::salvage_report(salvage, options.program);
  report["kind"] = "salvage";
  report["target"] = options.target;
  report["dry_run"] = flags.dry_run;
  if (session->json) session->print_json(report);
  say_result(session, salvage);
  session->say(flags.dry_run ? "nothing was written (--dry-run)" : "*** Done! " + options.target);
  session->status = salvage.complete() ? kDone : kAnswerIsNo;
}

}  // namespace

void add_salvage(CLI::App* app, Session* session) {
  auto flags = std::make_shared<SalvageFlags>();
  CLI::App* verb = app->add_subcommand(
      "salvage", "Of a damaged checkpoint: what verifies as safetensors, and a list of the rest");
  verb->add_option("SOURCE", flags->source)->required();
  verb->add_option("TARGET", flags->target, "A folder: weights/, exp_avg/ …, copies/, salvage.json")
      ->required();
  verb->add_flag("--partial", flags->partial,
                 "Also tensors that are good in part, under partial/: what is lost is NaN");
  verb->add_option("--max-shard-size", flags->max_shard_size, "Size of one file")
      ->capture_default_str();
  verb->add_flag("--overwrite", flags->overwrite, "Exchange an existing target whole");
  verb->add_flag("--dry-run", flags->dry_run, "Say what would be salvaged and write nothing");
  add_source_flags(verb, session);
  verb->callback([session, flags] { run_salvage(session, *flags); });
}

}  // namespace isoshard::tools
