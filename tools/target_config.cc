// See target_config.h.
#include "tools/target_config.h"

#include <algorithm>

#include "core/error.h"

namespace isoshard::tools {
namespace {

using nlohmann::json;

[[noreturn]] void refuse_config(const std::string& file, const std::string& key, int least,
                                int most, const json& found) {
  throw Error(ErrorInfo{
      .code = ErrorCode::kUsage,
      .what = "The DeepSpeed config does not say what the target is to be.",
      .file = file,
      .entry = key,
      .expected = key == "zero_optimization"
                      ? "an object with stage"
                      : "a number from " + std::to_string(least) + " to " + std::to_string(most),
      .found = found.dump(),
      .next = "write the number into a copy of the config, or say --to instead"});
}

struct Number {
  const char* key;
  int otherwise, least, most;
};

int number_in(const json& holder, const std::string& file, const Number& number) {
  if (!holder.is_object() || !holder.contains(number.key)) return number.otherwise;
  const json& value = holder[number.key];
  const bool fits = value.is_number_integer() && value >= number.least && value <= number.most;
  if (!fits) refuse_config(file, number.key, number.least, number.most, value);
  return value.get<int>();
}

constexpr int kMostRanks = 1'000'000;

}  // namespace

TargetSpec spec_from_config(Session* session, const std::string& file) {
  const json config =
      json::parse(read_small_file(session->storage, file, 16 << 20), nullptr, false);
  if (!config.is_object()) {
    throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                          .what = "The DeepSpeed config is not a JSON object.",
                          .file = file});
  }
  const auto part = [&](const char* key) { return config.value(key, json::object()); };
  TargetSpec spec;
  const json zero = part("zero_optimization");
  if (!zero.is_object()) refuse_config(file, "zero_optimization", 0, 3, zero);
  spec.stage = number_in(zero, file, {"stage", 0, 0, 3});
  spec.topology.sequence = number_in(config, file, {"sequence_parallel_size", 1, 1, kMostRanks});
  spec.topology.tensor =
      std::max(1, number_in(part("tensor_parallel"), file, {"autotp_size", 1, 0, kMostRanks}));
  const json pipeline = part("pipeline");
  if (!pipeline.is_object() || !pipeline.contains("stages") || pipeline["stages"] != "auto")
    spec.topology.pipeline = number_in(pipeline, file, {"stages", 0, 1, kMostRanks});
  const json experts = part("expert_parallel");
  if (experts.is_object() && experts.value("enabled", json(false)) == true)
    spec.topology.expert = number_in(experts, file, {"autoep_size", 1, 1, kMostRanks});
  return spec;
}

void share_world(const checkpoint::ShardedState& source, const std::string& file, int world,
                 TargetSpec* spec) {
  if (spec->topology.expert > 0 && source.expert_layout == checkpoint::ExpertLayout::kNative) {
    throw Error(
        ErrorInfo{.code = ErrorCode::kUsage,
                  .what = "The config enables AutoEP; the checkpoint has native MoE layers.",
                  .file = file,
                  .entry = "expert_parallel",
                  .next = "`isoshard migrate --to autoep` makes AutoEP's stacks of them"});
  }
  const int64_t stages =
      spec->topology.pipeline > 0 ? spec->topology.pipeline : int64_t{source.topology.pipeline};
  const int64_t replica =
      stages * spec->topology.sequence * int64_t{std::max(1, spec->topology.tensor)};
  if (world < 1 || world % replica != 0) {
    throw Error(ErrorInfo{
        .code = ErrorCode::kUsage,
        .what = "--to-config needs --world N, a multiple of the config's sequence_parallel_size "
                "times autotp_size times the pipeline stages.",
        .file = file,
        .expected = "a multiple of " + std::to_string(replica),
        .found = std::to_string(world)});
  }
  spec->topology.data = static_cast<int>(world / replica);
}

json regular_load(const checkpoint::ShardedState& source, const TargetSpec& spec) {
  const Topology& from = source.topology;
  const Topology to = resolve(spec, from);
  const int stage = spec.stage >= 0 ? spec.stage : source.stage;
  std::vector<std::string> differs;
  const auto compare = [&](const std::string& what, int saved, int run, const std::string& why) {
    if (saved == run) return;
    differs.push_back(what + " " + std::to_string(saved) + " in the checkpoint, " +
                      std::to_string(run) + " in the run: " + why);
  };
  const bool partitions =
      source.stage > 0 || source.expert_layout != checkpoint::ExpertLayout::kNone;
  const bool other_form =
      source.stage != stage && (source.stage == 0 || source.stage == 3 || stage == 0 || stage == 3);
  if (other_form) compare("ZeRO stage", source.stage, stage, "its files have another form");
  if (partitions)
    compare("dp*sp", from.zero_ranks(), to.zero_ranks(),
            "the optimizer's partitions are of other ranks (DeepSpeed: ZeRORuntimeException)");
  compare("tp", from.tensor, to.tensor, "the ranks' shards have other shapes");
  compare("pp", from.pipeline, to.pipeline, "the stages hold other layers");
  compare("ep (autoep_size)", from.expert, to.expert,
          "a rank would take other experts' moments; DeepSpeed does not compare the sizes");
  json result = {{"fits", differs.empty()}, {"differs", differs}, {"command", ""}};
  if (!differs.empty()) {
    std::string target = "dp=" + std::to_string(to.data);
    for (const Axis axis : {Axis::kSequence, Axis::kTensor, Axis::kExpert, Axis::kPipeline}) {
      if (to.degree(axis) != 1 || from.degree(axis) != 1)
        target += "," + std::string(name(axis)) + "=" + std::to_string(to.degree(axis));
    }
    result["command"] = "isoshard reshard " + source.folder + " TARGET --to " + target +
                        ",stage=" + std::to_string(stage);
  }
  return result;
}

}  // namespace isoshard::tools
