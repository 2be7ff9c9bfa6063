// See conversion.h.
#include "tools/conversion.h"

#include <algorithm>

#include "checkpoint/deepspeed/source.h"
#include "checkpoint/leftover_folder.h"
#include "checkpoint/manifest.h"
#include "checkpoint/publication.h"
#include "core/error.h"
#include "reshard/published_target.h"
#include "tools/version.h"

namespace isoshard::tools {
namespace {

// The nearest folder that is there.
std::string existing_parent(Session* session, const std::string& target) {
  std::string folder = checkpoint::parent_folder(target);
  while (!session->storage.is_directory(folder) && folder != "/" && folder != ".")
    folder = checkpoint::parent_folder(folder);
  return folder;
}

void print_plan(Session* session, const reshard::ReshardPlan& plan,
                const reshard::ConvertOptions& options) {
  const std::string& target = options.target;
  const FreeSpace space = session->storage.free_space(existing_parent(session, target));
  nlohmann::json object = {{"kind", "plan"},
                           {"target", target},
                           {"transfers", plan.transfers.size()},
                           {"files", plan.targets.size()},
                           {"bytes_to_read", plan.bytes_to_read()},
                           {"bytes_to_write", plan.bytes_to_write()},
                           {"workers", session->stream_options().workers},
                           {"buffer_bytes", session->stream_options().workers * (3 << 20)},
                           {"free_bytes", space.bytes}};
  if (space.inodes >= 0) object["free_inodes"] = space.inodes;
  if (options.resume) {
    object["resume_from"] = nullptr;
    if (options.leftover) object["resume_from"] = options.leftover->path;
  }
  if (session->json) {
    session->print_json(object);
    return;
  }
  for (const auto& [key, value] : object.items())
    session->say(key + std::string(key.size() < 16 ? 16 - key.size() : 1, ' ') + value.dump());
  session->say("nothing was written (--dry-run)");
}

}  // namespace

void check_space(Session* session, const reshard::ReshardPlan& plan, const std::string& target,
                 const checkpoint::LeftoverFolder* there) {
  const FreeSpace space = session->storage.free_space(existing_parent(session, target));
  const auto planned = static_cast<int64_t>(plan.targets.size());
  const int64_t files = planned + 2 - (there ? std::min(there->files, planned) : 0);
  const int64_t bytes =
      std::max<int64_t>(0, plan.bytes_to_write() - (there ? there->stored_bytes : 0));
  const bool bytes_short = space.bytes < bytes,
             inodes_short = space.inodes >= 0 && space.inodes < 2 * files;
  if (!bytes_short && !inodes_short) return;
  throw Error(
      ErrorInfo{.code = ErrorCode::kNoSpace,
                .what = bytes_short ? "The target's file system has too little space."
                                    : "The target's file system has too few inodes.",
                .file = target,
                .expected = std::to_string(bytes) + " bytes in " + std::to_string(files) + " files",
                .found = std::to_string(space.bytes) + " bytes and " +
                         std::to_string(space.inodes) + " inodes free",
                .safe = "nothing was written",
                .next = "free some space, or name a target elsewhere"});
}

bool is_inside(const std::string& inner, const std::string& outer) {
  return inner == outer || inner.rfind(outer + "/", 0) == 0;
}

void point_latest_universal(const ConversionFlags& flags, const std::string& target,
                            reshard::ConvertOptions* options) {
  if (flags.no_latest) return;
  options->latest_path = checkpoint::join(checkpoint::parent_folder(target), "latest_universal");
  options->latest_text = checkpoint::base_name(target);
}

void add_conversion_flags(CLI::App* verb, ConversionFlags* flags) {
  verb->add_flag("--overwrite", flags->overwrite, "Exchange an existing target whole");
  verb->add_flag("--resume", flags->resume, kResumeHelp);
  verb->add_flag("--no-latest", flags->no_latest, "Leave the pointer file beside the target alone");
  verb->add_flag("--dry-run", flags->dry_run, "Print the plan and do nothing");
  verb->add_flag("--force", flags->force,
                 "Go on from a source that does not agree with itself (verify: SUSPECT)");
  verb->add_option("--verify", flags->verify,
                   "stream: digest what is written; reread: read it back; disk: from the disk")
      ->check(CLI::IsMember({"stream", "reread", "disk"}))
      ->capture_default_str();
}

void refuse_overlap(Session* session, const std::string& source, const std::string& target) {
  std::vector<std::string> sources = {source};
  sources.insert(sources.end(), session->also.begin(), session->also.end());
  const std::string to = session->storage.canonical(target);
  const bool apart = std::ranges::none_of(sources, [&](const std::string& each) {
    const std::string from = session->storage.canonical(each);
    return is_inside(to, from) || is_inside(from, to);
  });
  if (apart) return;
  throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                        .what = "The target is the source, inside it, or around it.",
                        .file = target,
                        .expected = "a folder apart from " + quote(source),
                        .found = quote(target),
                        .safe = "nothing was written",
                        .next = "name another target"});
}

checkpoint::ShardedState open_to_convert(Session* session, const std::string& source,
                                         const ConversionFlags& flags) {
  return session->open(source, !flags.force || session->read.param_order.empty());
}

namespace {

void refuse_unfinished(Session* session, const std::string& folder, bool force,
                       reshard::ConvertOptions* options) {
  const auto has = [&](const char* name) {
    return session->storage.is_file(checkpoint::join(folder, name));
  };
  const bool without = has("certificate.json") && !has(checkpoint::kManifestName);
  if (!without && !checkpoint::is_unfinished(session->storage, folder)) return;
  const std::string what =
      without ? "The source was written by isoshard and has no MANIFEST.json, which is written "
                "last: the command that wrote it did not finish, or the copy of the folder did not."
              : "The source holds the mark of a command of isoshard that did not finish.";
  if (force) {
    session->notice("notice: going on (--force). " + what);
    options->forced.push_back(what);
    return;
  }
  throw Error(ErrorInfo{.code = ErrorCode::kIncomplete,
                        .what = what,
                        .file = folder,
                        .safe = "nothing was written",
                        .next = "make or copy it again; --force takes it as it is"});
}

}  // namespace

void refuse_doubtful(Session* session, const checkpoint::ShardedState& state,
                     const ConversionFlags& flags, reshard::ConvertOptions* options) {
  refuse_unfinished(session, state.folder, flags.force, options);
  for (const std::string& doubt : state.doubts) {
    if (flags.force) {
      options->forced.push_back(doubt);
      continue;  // the notice was given when it was opened
    }
    throw Error(ErrorInfo{.code = ErrorCode::kMismatch,
                          .what = doubt + ".",
                          .file = state.folder,
                          .safe = "nothing was written",
                          .next = "look at the names with `isoshard inspect --parameters`; " +
                                  std::string(flags.not_strict) +
                                  " goes on and puts it into the certificate"});
  }
}

nlohmann::json source_certificate(const checkpoint::ShardedState& state, const std::string&) {
  nlohmann::json certificate = {{"program", program_version()}};
  certificate["source"] = {{"tag", state.tag},
                           {"format", name(state.flavour)},
                           {"topology", to_string(state.topology)},
                           {"stage", state.stage},
                           {"ds_version", state.version}};
  for (const std::string& text : state.inferred) {
    const size_t colon = text.find(": ");
    certificate["inferred"].push_back(
        {{"what", text.substr(0, colon)},
         {"evidence", colon == std::string::npos ? "" : text.substr(colon + 2)}});
  }
  for (const std::string& text : state.skipped) certificate["skipped"].push_back(text);
  return certificate;
}

reshard::ConvertOptions conversion_options(Session* session, const ConversionFlags& flags,
                                           const std::string& target) {
  reshard::ConvertOptions options;
  options.target = target;
  while (options.target.size() > 1 && options.target.back() == '/') options.target.pop_back();
  options.overwrite = flags.overwrite;
  options.resume = flags.resume;
  options.verify = flags.verify == "stream" ? reshard::VerifyMode::kStream
                   : flags.verify == "disk" ? reshard::VerifyMode::kDisk
                                            : reshard::VerifyMode::kReread;
  options.doubt =
      flags.force ? reshard::ConvertOptions::Doubt::kGoOn : reshard::ConvertOptions::Doubt::kRefuse;
  options.stream = session->stream_options();
  options.phase = [session, number = 0](const std::string& text) mutable {
    session->say("*** " + std::to_string(++number) + ". " + text);
  };
  return options;
}

namespace {

bool has_manifest(Session* session, const std::string& folder) {
  return session->storage.is_file(checkpoint::join(folder, checkpoint::kManifestName));
}

// The target is there; of what comes beside it, something may be missing. Whether that was done.
bool finish_published(Session* session, const checkpoint::ShardedState& state,
                      const reshard::ReshardPlan& plan, const reshard::ConvertOptions& options,
                      bool dry_run) {
  if (!options.resume || options.overwrite || !has_manifest(session, options.target)) return false;
  const std::vector<std::string> missing = reshard::missing_beside(session->storage, options);
  if (missing.empty()) return false;
  std::string list;
  for (const std::string& path : missing) list += (list.empty() ? "" : ", ") + quote(path);
  const std::string why = reshard::why_another_target(session->storage, state, plan, options);
  if (!why.empty()) {
    throw Error(ErrorInfo{.code = ErrorCode::kExists,
                          .what = "The target is there, and is not known to be what this command "
                                  "makes: " +
                                  why + ".",
                          .file = options.target,
                          .found = "missing beside it, or another: " + list,
                          .safe = "nothing was written",
                          .next = "isoshard verify it; name another target, or give --overwrite "
                                  "to make it anew"});
  }
  if (dry_run) {
    session->say("the target is there; missing beside it is " + list +
                 "; nothing was written (--dry-run)");
    if (session->json)
      session->print_json({{"kind", "plan"}, {"target", options.target}, {"to_finish", missing}});
    return true;
  }
  reshard::place_beside(session->storage, options);
  session->say("resumed: the target is there, whole, and of this source; missing beside it was " +
               list);
  if (session->json) {
    session->print_json({{"kind", "conversion"},
                         {"target", options.target},
                         {"bytes_read", 0},
                         {"bytes_written", 0},
                         {"finished", missing}});
  }
  session->say("*** Done! " + options.target);
  return true;
}

// A target that stands there is not what --resume goes on from.
void refuse_to_resume(Session* session, const reshard::ConvertOptions& options) {
  if (options.overwrite || !session->storage.is_directory(options.target)) return;
  if (checkpoint::is_unfinished(session->storage, options.target)) {
    throw Error(ErrorInfo{
        .code = ErrorCode::kUnsupported,
        .what = "The target was written under its final name, as folders cannot be renamed there, "
                "and is unfinished: --resume cannot go on from it.",
        .file = options.target,
        .safe = "nothing was written",
        .next = "when no command is at work there, delete it and give the command again"});
  }
  if (!has_manifest(session, options.target)) return;
  throw Error(ErrorInfo{.code = ErrorCode::kExists,
                        .what = "The target is there, with its manifest and what belongs beside "
                                "it: there is nothing to go on from.",
                        .file = options.target,
                        .safe = "nothing was written",
                        .next = "isoshard verify it; --overwrite makes it anew"});
}

// What lies beside the target: taken up, or told.
void look_for_leftovers(Session* session, reshard::ConvertOptions* options) {
  const std::string parent = checkpoint::parent_folder(options->target);
  if (!options->resume) {
    for (const std::string& leftover : checkpoint::leftovers(session->storage, parent)) {
      session->notice("notice: beside the target lies " + quote(leftover) +
                      ", which an interrupted command has left (then delete it, or give --resume), "
                      "or one still at work");
    }
    return;
  }
  refuse_to_resume(session, *options);
  checkpoint::LeftoverSearch search =
      checkpoint::find_leftover_folder(session->storage, options->target);
  for (const std::string& text : search.passed_over)
    session->notice("notice: --resume leaves alone " + text);
  if (search.found == nullptr) {
    session->say("nothing to resume: no interrupted command has left anything here to go on from");
    return;
  }
  options->leftover = std::move(search.found);
  session->say("resuming     " + quote(options->leftover->path) + ", " +
               human_bytes(options->leftover->stored_bytes));
}

void tell_resumed(Session* session, const reshard::ConvertResult& result) {
  if (!result.resumed) return;
  const reshard::ResumeResult& resumed = result.stream.resumed;
  session->say("resumed: " + std::to_string(resumed.files_equal) + " of " +
               std::to_string(result.stream.files.size()) + " files (" +
               human_bytes(resumed.bytes_equal) +
               " in these and others) were there already and are equal, " +
               human_bytes(result.stream.bytes_written) + " written");
}

nlohmann::json resumed_json(const reshard::ConvertResult& result) {
  const reshard::ResumeResult& resumed = result.stream.resumed;
  if (!result.resumed) return nullptr;
  return {{"files_found", resumed.files_found},
          {"files_equal", resumed.files_equal},
          {"bytes_equal", resumed.bytes_equal},
          {"bytes_wrong", resumed.bytes_wrong}};
}

}  // namespace

void finish_conversion(Session* session, const checkpoint::ShardedState& state,
                       std::vector<checkpoint::FileBlueprint> files, const ConversionFlags& flags,
                       reshard::ConvertOptions* options) {
  const reshard::ReshardPlan plan = reshard::make_plan(state, std::move(files));
  if (finish_published(session, state, plan, *options, flags.dry_run)) return;
  look_for_leftovers(session, options);
  if (flags.dry_run) return print_plan(session, plan, *options);
  check_space(session, plan, options->target, options->leftover.get());
  const reshard::ConvertResult result = reshard::convert(session->storage, state, plan, *options);
  if (const int64_t wrong = result.stream.resumed.bytes_wrong; wrong > 0) {
    session->notice("notice: " + std::to_string(wrong) +
                    " bytes of what lay there were not what they must be, and were written anew");
  }
  if (session->json) {
    nlohmann::json object = {{"kind", "conversion"},
                             {"target", options->target},
                             {"bytes_read", result.stream.bytes_read},
                             {"bytes_written", result.stream.bytes_written},
                             {"certificate", result.certificate}};
    if (options->resume) object["resumed"] = resumed_json(result);
    session->print_json(std::move(object));
    return;
  }
  for (const auto& [section, verdict] : result.certificate["sections"].items()) {
    const reshard::SectionDigest* digest = find_section(result.source, section);
    session->say(
        "  " + section + std::string(section.size() < 12 ? 12 - section.size() : 1, ' ') +
        (verdict.is_string() ? verdict.get<std::string>() : verdict.dump()) +
        (digest && digest->absent.empty() ? "  iso1:" + digest->hex.substr(0, 16) + "…" : ""));
  }
  tell_resumed(session, result);
  session->say("read " + human_bytes(result.stream.bytes_read) + ", wrote " +
               human_bytes(result.stream.bytes_written) + " in " +
               std::to_string(result.stream.files.size()) + " files");
  session->say("*** Done! " + options->target);
}

}  // namespace isoshard::tools
