// ds_to_universal and zero_to_fp32: the names, flags, phase lines and output names that people's
// scripts already use (deepspeed/checkpoint/ds_to_universal.py, deepspeed/utils/zero_to_fp32.py).
#include "checkpoint/deepspeed/fields.h"
#include "checkpoint/deepspeed/source.h"
#include "core/error.h"
#include "tools/conversion.h"
#include "tools/session.h"

namespace isoshard::tools {
namespace {

struct Ignored {
  int extract_workers = 4, merge_workers = 2;
  bool keep_temp = false, debug = false;
};

constexpr const char* kOverwriteHelp = "Not DeepSpeed's: exchange an existing target whole";
constexpr const char* kAliasResumeHelp =
    "Not DeepSpeed's: go on from what an interrupted command has left";
constexpr const char* kForceHelp =
    "Not DeepSpeed's: go on from a source that does not agree with itself";

struct UniversalAlias {
  ConvertFlags flags;
  Ignored ignored;
  bool inject = false;
};

// Of stages 1 and 2 DeepSpeed's converter goes on without it only when told to.
void require_split_info(const checkpoint::ShardedState& state) {
  if (state.stage < 1 || state.stage > 2 || state.model_files.empty()) return;
  const checkpoint::Fields model(state.document(state.model_files[0]));
  if (model.maybe(model.root(), "universal_checkpoint_info") != checkpoint::kNoNode) return;
  throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                        .what = "Required universal_checkpoint_info state is missing.",
                        .file = state.folder,
                        .next = "pass --inject_missing_state, as DeepSpeed asks too"});
}

void run_ds_to_universal(Session* session, const UniversalAlias& alias) {
  const checkpoint::SourcePlace place =
      checkpoint::resolve_source(session->storage, alias.flags.source, "");
  if (!place.save_folder.empty()) {
    throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                          .what = "--input_folder is the tag folder, not its parent.",
                          .file = alias.flags.source,
                          .expected = quote(place.folder),
                          .found = quote(alias.flags.source),
                          .next = "name the tag folder"});
  }
  ConvertFlags flags = alias.flags;
  if (!alias.inject) flags.accept = require_split_info;
  flags.common.not_strict = "--no_strict";
  flags.banner = {"*** 1. Extracting ZeRO fragments", "*** 2. Merging slices .....",
                  "*** 3. Saving common optimizer states"};
  run_convert(session, flags);
}

}  // namespace

void add_deepspeed_aliases(CLI::App* app, Session* session) {
  auto universal = std::make_shared<UniversalAlias>();
  CLI::App* verb =
      app->add_subcommand("ds_to_universal", "DeepSpeed's ds_to_universal.py, by its own flags");
  verb->add_option("--input_folder", universal->flags.source, "The tag folder")->required();
  verb->add_option("--output_folder", universal->flags.target, "The universal folder")->required();
  verb->add_option("--num_extract_workers", universal->ignored.extract_workers,
                   "Changes nothing here (--workers does)");
  verb->add_option("--num_merge_workers", universal->ignored.merge_workers, "Changes nothing here");
  verb->add_flag("--keep_temp_folder", universal->ignored.keep_temp,
                 "Changes nothing here: there are no temporary files");
  verb->add_flag_callback(
      "--no_strict", [session] { session->read.strict = false; },
      "Go on where universal_checkpoint_info has patterns that match no name");
  verb->add_flag("--inject_missing_state", universal->inject,
                 "Go on without universal_checkpoint_info, as DeepSpeed does only when asked");
  verb->add_flag("--overwrite", universal->flags.common.overwrite, kOverwriteHelp);
  verb->add_flag("--resume", universal->flags.common.resume, kAliasResumeHelp);
  verb->add_flag("--force", universal->flags.common.force, kForceHelp);
  add_common_flags(verb, session);
  verb->callback([session, universal] {
    universal->flags.to = "universal";
    run_ds_to_universal(session, *universal);
  });

  auto weights = std::make_shared<ConvertFlags>();
  auto ignored = std::make_shared<Ignored>();
  auto safe = std::make_shared<bool>(false);
  CLI::App* fp32 =
      app->add_subcommand("zero_to_fp32", "DeepSpeed's zero_to_fp32.py, by its own flags");
  fp32->add_option("checkpoint_dir", weights->source)->required();
  fp32->add_option("output_dir", weights->target)->required();
  fp32->add_option("--max_shard_size", weights->max_shard_size, "Size of one file")
      ->capture_default_str();
  fp32->add_flag("--safe_serialization", *safe, "safetensors instead of .bin");
  fp32->add_option("-t,--tag", session->read.tag, "Tag to read instead of the one in latest");
  fp32->add_flag("--exclude_frozen_parameters", weights->exclude_frozen,
                 "Leave frozen parameters out");
  fp32->add_flag("-d,--debug", ignored->debug, "Changes nothing here");
  fp32->add_flag("--overwrite", weights->common.overwrite, kOverwriteHelp);
  fp32->add_flag("--resume", weights->common.resume, kAliasResumeHelp);
  fp32->add_flag("--force", weights->common.force, kForceHelp);
  add_common_flags(fp32, session);
  fp32->callback([session, weights, safe, ignored] {
    weights->to = "fp32";
    weights->format = *safe ? "safetensors" : "bin";
    run_convert(session, *weights);
  });
}

}  // namespace isoshard::tools
