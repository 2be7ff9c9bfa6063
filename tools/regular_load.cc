// See regular_load.h.
#include "tools/regular_load.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "checkpoint/deepspeed/config_text.h"
#include "checkpoint/deepspeed/fields.h"
#include "checkpoint/deepspeed/model_states.h"
#include "checkpoint/deepspeed/reshard_target.h"
#include "core/error.h"

namespace isoshard::tools {
namespace {

using checkpoint::ExpertLayout;
using checkpoint::Flavour;
using checkpoint::ShardedState;
using nlohmann::json;

// What makes a difference go away: a reshard; or a universal folder, which does not depend on it.
enum class Mend { kReshard, kUniversal, kConfig };

bool in_partitions(int stage) { return stage == 1 || stage == 2; }

class Comparison {
 public:
  Comparison(const ShardedState& source, const RunConfig& run, const TargetSpec& spec)
      : source_(source),
        run_(run),
        to_(resolve(spec, source.topology)),
        stage_(spec.stage),
        zero_(run.keys.value("zero_optimization", json::object())) {
    compare_degrees();
    compare_experts();
    compare_dtype();
    compare_pipeline();
    compare_options();
  }
  bool fits() const { return differs_.empty(); }
  Mend mend() const { return mend_; }
  const Topology& topology() const { return to_; }
  int stage() const { return stage_; }
  json answer() const {
    return {{"fits", fits()},
            {"differs", differs_},
            {"not_compared", not_compared_},
            {"command", ""},
            {"next", ""}};
  }

 private:
  void differ(const std::string& text, Mend mend) {
    differs_.push_back(text);
    mend_ = std::max(mend_, mend);
  }
  void compare(const std::string& what, int64_t saved, int64_t run, const std::string& why,
               Mend mend = Mend::kReshard) {
    if (saved == run) return;
    differ(what + " " + std::to_string(saved) + " in the checkpoint, " + std::to_string(run) +
               " in the run: " + why,
           mend);
  }

  void compare_degrees() {
    const Topology& from = source_.topology;
    const bool partitions = source_.stage > 0 || source_.expert_layout != ExpertLayout::kNone;
    if (form(source_.stage) != form(stage_))
      compare("ZeRO stage", source_.stage, stage_, "its files have another form");
    if (partitions)
      compare("dp*sp", from.zero_ranks(), to_.zero_ranks(),
              "the optimizer's partitions are of other ranks (DeepSpeed: ZeRORuntimeException)");
    compare("tp", from.tensor, to_.tensor, "the ranks' shards have other shapes");
    compare("pp", from.pipeline, to_.pipeline, "the stages hold other layers");
    compare("ep (autoep_size)", from.expert, to_.expert,
            "a rank would take other experts' moments; DeepSpeed does not compare the sizes");
    if (source_.pipeline.present() && run_.spec.topology.tensor == 0)
      not_compared_.push_back("tensor-parallel ranks of the pipeline, which no config names");
  }
  static int form(int stage) { return in_partitions(stage) ? 1 : stage; }

  void compare_experts() {
    if (source_.expert_layout == ExpertLayout::kNative) not_compared_.push_back("ep_size of MoE");
    const bool saved = source_.expert_layout == ExpertLayout::kAutoEp;
    if (saved != run_.autoep)
      differ(saved
                 ? "AutoEP in the checkpoint, not enabled in the run: its experts have other names"
                 : "AutoEP enabled in the run, no AutoEP layers in the checkpoint",
             Mend::kConfig);
    const bool divides = std::ranges::all_of(source_.splits, [&](const auto& split) {
      return split.kind != checkpoint::SplitKind::kExperts ||
             split.map.logical_shape.at(0) % to_.expert == 0;
    });
    if (!divides)
      differ("ep (autoep_size) " + std::to_string(to_.expert) +
                 " does not divide the experts: DeepSpeed refuses it (ValueError)",
             Mend::kConfig);
  }

  // Whether the config turns a dtype on; none: "auto", or of another type.
  std::optional<bool> enabled(std::initializer_list<const char*> sections) const {
    for (const char* section : sections) {
      const json part = run_.keys.value(section, json());
      if (part.is_null()) continue;
      const json value = part.is_object() ? part.value("enabled", json(false)) : json("auto");
      if (!value.is_boolean()) return std::nullopt;
      if (value.get<bool>()) return true;
    }
    return false;
  }
  std::optional<bool> bf16() const { return enabled({"bf16", "bfloat16"}); }

  void compare_dtype() {
    DType saved = DType::kFloat32;
    for (const checkpoint::ParameterState& parameter : source_.parameters) {
      if (parameter.group >= 0 && parameter.model_dtype != DType::kFloat32)
        saved = parameter.model_dtype;
    }
    const std::optional<bool> in_bf16 = bf16(), in_fp16 = enabled({"fp16"});
    if (!in_bf16 || !in_fp16)
      return not_compared_.push_back("bf16 and fp16, which the config leaves to be found out");
    const DType runs = *in_bf16 ? DType::kBFloat16 : *in_fp16 ? DType::kFloat16 : DType::kFloat32;
    if (saved != runs)
      differ(std::string(name(saved)) + " in the checkpoint, " + name(runs) +
                 " in the run: its files have other names, copies or a loss scaler",
             Mend::kUniversal);
    if (in_partitions(source_.stage) && in_partitions(stage_)) compare_optimizer_form(*in_bf16);
  }

  // engine.py, _do_optimizer_sanity_check: BF16_Optimizer takes the place of ZeRO's at stage 1
  // where gradients are summed in fp32 and the optimizer is not on the CPU.
  void compare_optimizer_form(bool bf16_runs) {
    const std::string summed = text_of(run_.keys.value("data_types", json()), "grad_accum_dtype");
    const std::string device = text_of(zero_.value("offload_optimizer", json()), "device");
    const bool runs = bf16_runs && stage_ == 1 && checkpoint::means_fp32(summed) && device != "cpu";
    const bool saved = source_.flavour == Flavour::kBf16Optimizer;
    if (saved != runs)
      differ(std::string("BF16_Optimizer (data_types.grad_accum_dtype) ") + (saved ? "on" : "off") +
                 " in the checkpoint, " + (runs ? "on" : "off") +
                 " in the run: its files have another form",
             Mend::kUniversal);
  }
  static std::string text_of(const json& part, const char* key) {
    if (!part.is_object()) return "";
    const json value = part.value(key, json());
    return value.is_string() ? value.get<std::string>() : "";
  }

  void compare_pipeline() {
    if (!source_.pipeline.present()) return;
    if (stage_ >= 2)
      differ("a pipeline at stage " + std::to_string(stage_) +
                 ": DeepSpeed has them at stages 0 and 1 alone (AssertionError)",
             Mend::kConfig);
    if (stage_ == 0 && bf16().value_or(false))
      differ("a bf16 pipeline at stage 0: DeepSpeed from 0.18.9 on cannot load it (KeyError: 0)",
             Mend::kConfig);
  }

  // Nothing where the config has no number there.
  std::optional<int64_t> option(const char* key, int64_t otherwise) {
    if (!zero_.contains(key)) return otherwise;
    const json& value = zero_[key];
    if (value.is_boolean()) return value.get<bool>() ? 1 : 0;
    if (value.is_number() && std::abs(value.get<double>()) < 1e18)
      return static_cast<int64_t>(value.get<double>());
    not_compared_.push_back(key);
    return std::nullopt;
  }

  void compare_options() {
    if (in_partitions(source_.stage) && in_partitions(stage_) &&
        source_.flavour != Flavour::kBf16Optimizer) {
      if (const auto runs = option("round_robin_gradients", 0))
        compare("round_robin_gradients", source_.round_robin ? 1 : 0, *runs,
                "parameters lie in another order", Mend::kUniversal);
    }
    if (source_.stage == 3 && stage_ == 3) compare_sub_groups();
    not_compared_.push_back("optimizer and its parameter groups");
  }

  void compare_sub_groups() {
    const checkpoint::Fields model(source_.document(source_.model_files[0]));
    const int64_t standard = 1'000'000'000;
    const int64_t saved = checkpoint::zero_option(model, model.maybe(model.root(), "ds_config"),
                                                  "sub_group_size", standard);
    const std::optional<int64_t> runs = option("sub_group_size", standard);
    for (const checkpoint::GroupState& group : source_.groups) {
      int64_t elements = 0;
      for (int number : group.parameters)
        elements += numel(source_.parameters[static_cast<size_t>(number)].shape);
      if (runs && elements > std::min(saved, *runs))
        return compare("sub_group_size", saved, *runs, "sub-groups may hold other parameters",
                       Mend::kUniversal);
    }
  }

  const ShardedState& source_;
  const RunConfig& run_;
  const Topology to_;
  const int stage_;
  const json zero_;
  Mend mend_ = Mend::kReshard;
  std::vector<std::string> differs_, not_compared_;
};

std::string reshard_command(const Session& session, const ShardedState& source,
                            const Comparison& comparison) {
  const Topology& to = comparison.topology();
  std::string target = "dp=" + std::to_string(to.data);
  for (const Axis axis : {Axis::kSequence, Axis::kTensor, Axis::kExpert, Axis::kPipeline}) {
    if (to.degree(axis) != 1 || source.topology.degree(axis) != 1)
      target += "," + std::string(name(axis)) + "=" + std::to_string(to.degree(axis));
  }
  std::string command = "isoshard reshard " + shell_word(session.source) + " TARGET --to " +
                        target + ",stage=" + std::to_string(comparison.stage());
  const checkpoint::ReadOptions& read = session.read;
  if (!read.tag.empty()) command += " --tag " + shell_word(read.tag);
  if (read.sequence_degree > 0) command += " --sp " + std::to_string(read.sequence_degree);
  if (!read.param_order.empty()) command += " --param-order " + shell_word(read.param_order);
  for (const std::string& folder : session.also) command += " --also " + shell_word(folder);
  if (read.allow_renamed) command += " --allow-renamed";
  if (!read.strict) command += " --no-strict";
  return command;
}

// Plans the reshard; what is in its way, or nothing.
std::string obstacle(Session* session, const ShardedState& source, const Comparison& comparison) {
  if (!source.doubts.empty()) return source.doubts[0];
  try {
    checkpoint::ReshardOptions options;
    std::vector<std::string> inferred;
    const Topology& to = comparison.topology();
    if (!source.pipeline.present() && to.tensor > 1 && to.tensor != source.topology.tensor)
      infer_heads(session, source, "", &options.splits, &inferred);
    checkpoint::reshard_blueprints(source, to, comparison.stage(), options);
    return "";
  } catch (const Error& error) {
    const ErrorInfo& info = error.info();
    return info.what + (info.next.empty() ? "" : " " + info.next + ".");
  }
}

}  // namespace

json regular_load(Session* session, const ShardedState& source, const RunConfig& run,
                  const TargetSpec& spec) {
  const Comparison comparison(source, run, spec);
  json answer = comparison.answer();
  if (comparison.fits()) return answer;
  if (comparison.mend() != Mend::kReshard) {
    answer["next"] = comparison.mend() == Mend::kConfig
                         ? "change the config"
                         : "change the config; or load a universal folder (convert --to universal, "
                           "checkpoint.load_universal), whose files have one form";
    return answer;
  }
  constexpr int kMostPlanned = 4096;
  const bool planned = comparison.topology().world() <= kMostPlanned;
  const std::string why = planned ? obstacle(session, source, comparison) : "";
  const std::string command = reshard_command(*session, source, comparison);
  if (!planned)
    answer["next"] = "`" + command + "`, which was not planned here, for so many ranks";
  else if (why.empty())
    answer["command"] = command;
  else
    answer["next"] = "`" + command + "` is refused as it stands: " + why;
  return answer;
}

}  // namespace isoshard::tools
