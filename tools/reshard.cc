// isoshard reshard: the same state at another topology or ZeRO stage, proven equal before it
// appears.
#include <charconv>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "checkpoint/deepspeed/reshard_target.h"
#include "checkpoint/deepspeed/source.h"
#include "core/error.h"
#include "core/utf8.h"
#include "tools/conversion.h"
#include "tools/session.h"
#include "tools/side_carry.h"
#include "tools/target_config.h"

namespace isoshard::tools {
namespace {

struct ReshardFlags {
  std::string source, target, to, to_config, tag_out, split_like, model_config;
  int world = 0;
  bool no_side_files = false, beyond_deepspeed = false;
  int64_t moe_max_group_size = 0;
  std::vector<std::string> allow_dropped, tied_layers;
  checkpoint::SplitOptions splits;
  checkpoint::StageOptions stages;
  ConversionFlags common;
};

// "embed=0,5" as CLI11 has split it at the commas: "embed=0", "5", "head=7".
void read_tied_layers(const std::vector<std::string>& texts,
                      std::map<std::string, std::set<int>>* tied) {
  std::string key;
  for (std::string text : texts) {
    text.erase(0, text.find_first_not_of(' '));  // behind a comma
    const size_t equals = text.find('=');
    if (equals != std::string::npos) key = text.substr(0, equals);
    const std::string number = equals == std::string::npos ? text : text.substr(equals + 1);
    int layer = -1;
    const auto [rest, error] = std::from_chars(number.data(), number.data() + number.size(), layer);
    if (key.empty() || error != std::errc() || rest != number.data() + number.size() || layer < 0 ||
        layer > 100'000)
      throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                            .what = "The layers of a tied module cannot be read.",
                            .entry = "--tied-layers",
                            .expected = "KEY=N,N…: the key of a TiedLayerSpec and its layers",
                            .found = text});
    (*tied)[key].insert(layer);
  }
}

// Flags that speak of pipeline stages go with pipelines.
void check_stage_flags(const ReshardFlags& flags, const checkpoint::ShardedState& state) {
  const checkpoint::StageOptions& stages = flags.stages;
  if (state.pipeline.present() || (stages.parts.empty() && stages.method.empty() &&
                                   stages.layers == 0 && flags.tied_layers.empty()))
    return;
  throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                        .what = "The source is no checkpoint of a PipelineModule with layer files.",
                        .file = state.folder,
                        .entry = "--pp-parts, --partition-method, --num-layers, --tied-layers",
                        .next = "leave them out"});
}

void check_vocabulary_flag(const ReshardFlags& flags, const checkpoint::ShardedState& state,
                           const Topology& target) {
  const Topology& source = state.topology;
  if (flags.splits.vocabulary_rows == 0) return;
  if ((target.tensor > 1 || state.pipeline.present()) && target.tensor != source.tensor) return;
  throw Error(ErrorInfo{
      .code = ErrorCode::kUsage,
      .what = "--padded-vocab-size goes with --to tp=N, for another N, above 1 but for pipelines.",
      .found = "tp=" + std::to_string(source.tensor) + " to tp=" + std::to_string(target.tensor),
      .next = "leave it out"});
}

// AutoTP's rules, which a pipeline's own layers do not follow.
void check_head_flags(const ReshardFlags& flags, const checkpoint::ShardedState& state) {
  const bool given =
      flags.splits.kv_heads >= 0 || flags.splits.grain > 0 || !flags.model_config.empty();
  if (!given || !state.pipeline.present()) return;
  throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                        .what = "The tensor-parallel ranks of a pipeline hold equal shares.",
                        .file = state.folder,
                        .entry = "--num-kv-heads, --model-config, --tp-grain-size",
                        .next = "leave them out"});
}

std::string usable_tag(const ReshardFlags& flags, const checkpoint::ShardedState& state) {
  const std::string tag = flags.tag_out.empty() ? state.tag : flags.tag_out;
  if (const std::string why = why_unsafe_name(tag);
      !why.empty() || tag.find('/') != std::string::npos || tag.front() == '.' ||
      tag.starts_with("latest")) {
    throw Error(
        ErrorInfo{.code = ErrorCode::kUsage,
                  .what = "The tag cannot be used: " +
                          (why.empty() ? "it has a '/', or is a name of another use" : why) + ".",
                  .found = quote(tag),
                  .next = "name one with --tag-out"});
  }
  return tag;
}

// What the target rests on: said, and put into the certificate.
void tell_target(Session* session, const std::vector<std::string>& inferred,
                 const checkpoint::TargetFiles& files, reshard::ConvertOptions* options) {
  for (const std::string& text : inferred) {
    session->say("inferred     " + text);
    options->certificate["inferred"].push_back(text);
  }
  for (const std::string& text : files.synthesised)
    options->certificate["synthesised"].push_back(text);
  for (const std::string& text : files.skipped) options->certificate["skipped"].push_back(text);
  for (const std::string& text : files.beyond) {
    session->notice("notice: beyond DeepSpeed: " + text);
    options->certificate["beyond_deepspeed"].push_back(text);
  }
}

void adopt_splits_of(Session* session, const std::string& like, checkpoint::ShardedState* state) {
  const checkpoint::ShardedState other = session->open(like, /*prove=*/false);
  checkpoint::adopt_splits(state, other);
  for (const std::string& doubt : other.doubts)
    state->doubts.push_back("of " + quote(like) + " (--split-like): " + doubt);
}

void run_reshard(Session* session, const ReshardFlags& flags) {
  if (flags.to.empty() == flags.to_config.empty()) {
    throw Error(ErrorInfo{
        .code = ErrorCode::kUsage,
        .what =
            "Say the target once: --to dp=4[,sp=,tp=,ep=,pp=,stage=], or --to-config FILE --world "
            "N."});
  }
  if (flags.to_config.empty() && flags.world != 0) {
    throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                          .what = "--world goes with --to-config; --to says each degree.",
                          .next = "leave --world out"});
  }
  RunConfig run;
  if (flags.to.empty()) run = read_run_config(session, flags.to_config);
  TargetSpec spec = flags.to.empty() ? run.spec : parse_target(flags.to);
  refuse_overlap(session, flags.source, flags.target);
  session->read.moe_max_group_size = flags.moe_max_group_size;
  session->read.any_expert_format = flags.beyond_deepspeed;
  checkpoint::ShardedState state = open_to_convert(session, flags.source, flags.common);
  if (!flags.split_like.empty()) adopt_splits_of(session, flags.split_like, &state);
  if (flags.to.empty()) spec = share_world(state, run, flags.world);
  const Topology topology = resolve(spec, state.topology);
  const int stage = spec.stage >= 0 ? spec.stage : state.stage;
  const std::string tag = usable_tag(flags, state);
  checkpoint::ReshardOptions wanted;
  std::vector<std::string> inferred;
  wanted.allow_dropped = {flags.allow_dropped.begin(), flags.allow_dropped.end()};
  if (state.pipeline.present())
    wanted.splits = flags.splits;
  else if (topology.tensor > 1 && topology.tensor != state.topology.tensor) {
    wanted.splits = flags.splits;
    infer_heads(session, state, flags.model_config, &wanted.splits, &inferred);
  }
  check_vocabulary_flag(flags, state, topology);
  check_head_flags(flags, state);
  check_stage_flags(flags, state);
  wanted.stages = flags.stages;
  wanted.beyond_deepspeed = flags.beyond_deepspeed;
  wanted.moe_max_group_size = flags.moe_max_group_size;
  read_tied_layers(flags.tied_layers, &wanted.stages.tied);
  checkpoint::TargetFiles files = checkpoint::reshard_blueprints(state, topology, stage, wanted);
  inferred.insert(inferred.end(), files.inferred.begin(), files.inferred.end());
  reshard::ConvertOptions options =
      conversion_options(session, flags.common, checkpoint::join(flags.target, tag));
  refuse_doubtful(session, state, flags.common, &options);
  if (!flags.common.no_latest) {
    options.latest_path = checkpoint::join(flags.target, "latest");
    options.latest_text = tag;
  }
  options.dropped = std::set<std::string>(flags.allow_dropped.begin(), flags.allow_dropped.end());
  options.certificate = source_certificate(state, flags.source);
  options.certificate["target"] = {{"tag", tag},
                                   {"format", "ZeRO-" + std::to_string(stage)},
                                   {"topology", to_string(topology)},
                                   {"stage", stage},
                                   {"ds_version", state.version}};
  tell_target(session, inferred, files, &options);
  for (const std::string& text : flags.allow_dropped)
    options.certificate["dropped"].push_back(text + ", allowed by --allow-dropped");
  if (!flags.no_side_files)
    carry_side_files(session, state, flags.target, topology, flags.common.overwrite, &options);
  session->say(to_string(state.topology) + " stage " + std::to_string(state.stage) + "  →  " +
               to_string(topology) + " stage " + std::to_string(stage));
  finish_conversion(session, state, std::move(files.files), flags.common, &options);
}

}  // namespace

void add_reshard(CLI::App* app, Session* session) {
  auto flags = std::make_shared<ReshardFlags>();
  CLI::App* verb =
      app->add_subcommand("reshard", "The same state at another dp, sp, tp, ep, pp or ZeRO stage");
  verb->add_option("SOURCE", flags->source)->required();
  verb->add_option("TARGET", flags->target, "A save folder: TARGET/<tag>/, then TARGET/latest")
      ->required();
  verb->add_option("--to", flags->to,
                   "dp=4[,sp=2,tp=2,ep=2,pp=2,stage=3]; axes left out keep the source's degree");
  verb->add_option("--to-config", flags->to_config,
                   "A DeepSpeed config file instead, with --world");
  verb->add_option("--world", flags->world, "Number of ranks for --to-config");
  verb->add_option("--tag-out", flags->tag_out, "Tag of the target (default: the source's)");
  verb->add_option("--num-kv-heads", flags->splits.kv_heads,
                   "num_key_value_heads of the model, where the widths of --to tp= depend on it; "
                   "0: it names none")
      ->check(CLI::Range(0, 1'000'000));
  verb->add_option("--model-config", flags->model_config,
                   "The model's config.json, to read that number from (found beside the tag of a "
                   "Trainer folder)");
  verb->add_option("--tp-grain-size", flags->splits.grain,
                   "tp_grain_size of the run, if ds_config does not say it")
      ->check(CLI::Range(1, 1'000'000'000));
  verb->add_option("--padded-vocab-size", flags->splits.vocabulary_rows,
                   "Rows of a padded vocabulary in the target (default: as many as the source has)")
      ->check(CLI::Range(1, 2'000'000'000));
  verb->add_flag("--beyond-deepspeed", flags->beyond_deepspeed,
                 "AutoEP: take an ep that does not divide the experts, which DeepSpeed will not "
                 "load; read stage 3 of another checkpoint_format, which it will not convert");
  verb->add_option("--moe-max-group-size", flags->moe_max_group_size,
                   "max_group_size of split_params_into_different_moe_groups_for_optimizer in the "
                   "run (default: DeepSpeed's, 178956971), where ep changes")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 50));
  verb->add_option("--split-like", flags->split_like,
                   "A checkpoint of the same model with several tensor-parallel ranks, for a "
                   "source of one, which does not say how its tensors are cut");
  verb->add_option("--pp-parts", flags->stages.parts,
                   "Of the target: the first layer of each pipeline stage, then the number of "
                   "layers (pp=2: 0,3,6), as PipelineModule.parts is in its run")
      ->delimiter(',')
      ->check(CLI::Range(0, 100'000));
  verb->add_option("--partition-method", flags->stages.method,
                   "Of the target, instead of --pp-parts (which type:REGEX needs). Without "
                   "--num-layers the rule must give the source's stages too")
      ->transform(CLI::IsMember({"uniform", "parameters"}, CLI::ignore_case));
  verb->add_option("--num-layers", flags->stages.layers,
                   "Layers given to PipelineModule, functions too; the last may have no file")
      ->check(CLI::Range(1, 100'000));
  verb->add_option("--tied-layers", flags->tied_layers,
                   "KEY=0,5: the layers that share the TiedLayerSpec KEY (tied_modules.KEY), where "
                   "files do not show them")
      ->delimiter(',');
  verb->add_option("--allow-dropped", flags->allow_dropped,
                   "What may be left behind: client_state (of ranks other than 0), loss_scaler "
                   "(its hysteresis, at stage 0)")
      ->check(CLI::IsMember({"client_state", "loss_scaler"}));
  verb->add_flag("--no-side-files", flags->no_side_files,
                 "Leave a Trainer's or Accelerate's own files beside the source behind");
  add_conversion_flags(verb, &flags->common);
  add_source_flags(verb, session);
  verb->callback([session, flags] { run_reshard(session, *flags); });
}

}  // namespace isoshard::tools
