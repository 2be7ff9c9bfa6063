// isoshard convert: ZeRO → universal or fp32, proven equal before it is published.
#include "reshard/convert.h"

#include "checkpoint/deepspeed/expert_groups.h"
#include "checkpoint/deepspeed/name_filter.h"
#include "checkpoint/deepspeed/source.h"
#include "checkpoint/deepspeed/universal_blueprint.h"
#include "checkpoint/deepspeed/weights_blueprint.h"
#include "core/error.h"
#include "tools/conversion.h"
#include "tools/session.h"

namespace isoshard::tools {
namespace {

using checkpoint::ShardedState;

bool older(const std::string& version, const std::string& than) {
  const auto number = [](const std::string& text) {
    int major = 0, minor = 0, patch = 0;
    std::sscanf(text.c_str(), "%d.%d.%d", &major, &minor, &patch);
    return major * 1'000'000 + minor * 1'000 + patch;
  };
  return number(version) < number(than);
}

void refuse_partial(const ConvertFlags& flags) {
  if (flags.to == "fp32") return;
  throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                        .what = "A universal checkpoint of some parameters cannot be trained on: "
                                "--only goes with --to fp32.",
                        .next = "leave --only out"});
}

// DeepSpeed loads a universal form group by group and stops at the shorter list, so that a run at a
// smaller ep, which has more groups of experts, keeps those behind as they were made (erratum 59).
void warn_of_groups(Session* session, const ShardedState& state, int64_t most,
                    nlohmann::json* certificate) {
  if (state.expert_layout != checkpoint::ExpertLayout::kAutoEp || state.topology.expert == 1)
    return;
  const auto whole = checkpoint::group_experts_anew(state, 1, most);
  if (!whole || whole->groups.size() <= state.groups.size()) return;
  const std::string text =
      "a run at a smaller ep may have up to " + std::to_string(whole->groups.size()) +
      " optimizer groups, this form has " + std::to_string(state.groups.size()) +
      ": DeepSpeed leaves the experts of the others as they were made, silently. For such a run "
      "take the universal form of `reshard --to ep=1`, or reshard to its ep";
  session->notice("notice: " + text);
  (*certificate)["skipped"].push_back(text);
}

}  // namespace

void run_convert(Session* session, const ConvertFlags& flags) {
  session->read.lost_experts = true;  // weights are saved where masters are gone; it says so
  session->read.any_expert_format = flags.beyond_deepspeed;
  refuse_overlap(session, flags.source, flags.target);
  ShardedState state = open_to_convert(session, flags.source, flags.common);
  if (flags.accept) flags.accept(state);
  std::vector<std::string> left_out;
  if (!session->only.empty()) {
    refuse_partial(flags);
    state = checkpoint::select_names(std::move(state), session->only, &left_out);
  }
  nlohmann::json certificate = source_certificate(state, flags.source);
  for (const std::string& name : left_out)
    certificate["skipped"].push_back(quote(name) + ": not asked for by --only");
  reshard::ConvertOptions options = conversion_options(session, flags.common, flags.target);
  refuse_doubtful(session, state, flags.common, &options);
  if (!session->only.empty()) certificate["source"]["only"] = session->only;
  if (flags.beyond_deepspeed && flags.to != "universal")
    throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                          .what = "--beyond-deepspeed goes with --to universal.",
                          .next = "leave it out"});
  std::vector<checkpoint::FileBlueprint> files;
  if (flags.to == "universal") {
    warn_of_groups(session, state, flags.moe_max_group_size, &certificate);
    if (flags.as_deepspeed && !state.round_robin)
      session->notice("notice: --as-deepspeed changes nothing: the source has no round robin");
    if (flags.as_deepspeed && state.round_robin) {
      state = checkpoint::as_deepspeed_believes(state);
      options.doubt = reshard::ConvertOptions::Doubt::kDoNotLook;
      certificate["lossy"] = {
          "round-robin partitions read as DeepSpeed reads them (--as-deepspeed): parameters are "
          "swapped"};
    }
    checkpoint::TargetFiles universal =
        checkpoint::universal_blueprints(state, {.extra_folders = !older(flags.like, "0.19.6"),
                                                 .beyond_deepspeed = flags.beyond_deepspeed});
    if (flags.beyond_deepspeed) certificate["beyond_deepspeed"] = true;
    files = std::move(universal.files);
    for (const std::string& text : universal.synthesised)
      certificate["synthesised"].push_back(text);
    certificate["target"]["format"] =
        state.stage == 3 ? "universal (ZeRO-3 form)" : "universal (ZeRO-1/2 form)";
    point_latest_universal(flags.common, flags.target, &options);
  } else {
    const checkpoint::WeightsOptions weights{
        .safetensors = flags.format == "safetensors",
        .max_shard_bytes = checkpoint::parse_size(flags.max_shard_size),
        .exclude_frozen = flags.exclude_frozen,
        .buffers_in_fp32 = older(flags.like, "0.19.0"),
        .frozen_keep_dtype = older(flags.like, "0.19.0"),
        .ordered_dict = older(flags.like, "0.15.0")};
    checkpoint::TargetFiles made = checkpoint::weights_blueprints(state, weights);
    files = std::move(made.files);
    for (const std::string& text : made.skipped) certificate["skipped"].push_back(text);
    certificate["target"]["format"] = "fp32 weights, " + flags.format;
    options.weights_only = true;
    certificate["buffers"] = nlohmann::json::array();
    for (const checkpoint::BufferState& buffer : state.buffers) {
      certificate["buffers"].push_back(buffer.name);
    }
  }
  options.certificate = std::move(certificate);
  for (const std::string& line : flags.banner) session->say(line);
  finish_conversion(session, state, std::move(files), flags.common, &options);
}

void add_convert(CLI::App* app, Session* session) {
  auto flags = std::make_shared<ConvertFlags>();
  CLI::App* verb = app->add_subcommand(
      "convert", "ZeRO checkpoint to universal or fp32, proven equal to the source");
  verb->add_option("SOURCE", flags->source)->required();
  verb->add_option("TARGET", flags->target, "universal: the tag folder itself; fp32: a folder")
      ->required();
  verb->add_option("--to", flags->to)->required()->check(CLI::IsMember({"universal", "fp32"}));
  verb->add_option("--format", flags->format, "fp32: safetensors or bin")
      ->check(CLI::IsMember({"safetensors", "bin"}))
      ->capture_default_str();
  verb->add_option("--max-shard-size", flags->max_shard_size, "fp32: size of one file")
      ->capture_default_str();
  verb->add_flag("--exclude-frozen-parameters", flags->exclude_frozen,
                 "fp32: leave frozen parameters out");
  verb->add_option("--like", flags->like, "Output as this DeepSpeed version writes it")
      ->check([](const std::string& text) {
        int numbers[3] = {}, length = 0;
        const int found =
            std::sscanf(text.c_str(), "%d.%d.%d%n", &numbers[0], &numbers[1], &numbers[2], &length);
        const bool good = found == 3 && static_cast<size_t>(length) == text.size();
        return good ? "" : "--like must be a version such as 0.16.9, not '" + text + "'";
      })
      ->capture_default_str();
  verb->add_flag("--as-deepspeed", flags->as_deepspeed,
                 "Round robin: swap parameters as DeepSpeed's converter does");
  verb->add_flag(
      "--beyond-deepspeed", flags->beyond_deepspeed,
      "universal: also where DeepSpeed's converter has no code (AutoEP with AutoTP, or of another "
      "checkpoint_format at stage 3)");
  verb->add_option("--moe-max-group-size", flags->moe_max_group_size,
                   "universal: AutoEP's, to say where a run would have more groups of experts")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 50))
      ->capture_default_str();
  add_conversion_flags(verb, &flags->common);
  add_source_flags(verb, session);
  add_only_flag(verb, session);
  verb->callback([session, flags] { run_convert(session, *flags); });
}

}  // namespace isoshard::tools
