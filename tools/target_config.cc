// See target_config.h.
#include "tools/target_config.h"

#include <algorithm>

#include "checkpoint/deepspeed/source.h"
#include "checkpoint/shallow_json.h"
#include "core/error.h"

namespace isoshard::tools {
namespace {

using nlohmann::json;

[[noreturn]] void refuse_config(const std::string& file, const std::string& key,
                                const std::string& expected, const json& found) {
  throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                        .what = "The DeepSpeed config does not say what the run is to be.",
                        .file = file,
                        .entry = key,
                        .expected = expected,
                        .found = found.dump(),
                        .next = "write it into a copy of the config, or say --to instead"});
}

struct Number {
  const char* key;
  int otherwise, least, most;
};

int number_in(const json& holder, const std::string& file, const Number& number) {
  if (!holder.contains(number.key)) return number.otherwise;
  const json& value = holder[number.key];
  const bool fits = value.is_number_integer() && value >= number.least && value <= number.most;
  if (!fits)
    refuse_config(
        file, number.key,
        "a number from " + std::to_string(number.least) + " to " + std::to_string(number.most),
        value);
  return value.get<int>();
}

// A section of the config; an empty object if there is none.
json part_of(const json& config, const std::string& file, const char* key) {
  const json part = config.value(key, json::object());
  if (!part.is_object()) refuse_config(file, key, "an object", part);
  return part;
}

constexpr int kMostRanks = 1'000'000;

// DeepSpeed refuses a config with a key twice, too.
json config_keys(const std::string& text, const std::string& file) {
  checkpoint::ShallowJson read = checkpoint::read_shallow_json(text);
  if (read.why.empty() && read.value.is_object()) return std::move(read.value);
  std::string what = "The DeepSpeed config is not a JSON object.";
  if (read.why.starts_with("nested")) what = "The DeepSpeed config is nested too deeply.";
  if (!read.key.empty()) what = "The DeepSpeed config has a key twice; DeepSpeed refuses it.";
  throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                        .what = what,
                        .file = file,
                        .entry = read.key.empty() ? "" : quote(read.key),
                        .expected = "a JSON object with each key once",
                        .found = read.why,
                        .safe = "nothing was written",
                        .next = "mend the config"});
}

}  // namespace

RunConfig read_run_config(Session* session, const std::string& file) {
  RunConfig run;
  run.file = file;
  run.keys = config_keys(read_small_file(session->storage, file, 16 << 20), file);
  TargetSpec& spec = run.spec;
  spec.stage = number_in(part_of(run.keys, file, "zero_optimization"), file, {"stage", 0, 0, 3});
  spec.topology.sequence = number_in(run.keys, file, {"sequence_parallel_size", 1, 1, kMostRanks});
  // Left open (0) where there is no such section: a pipeline's caller makes these ranks.
  if (run.keys.contains("tensor_parallel"))
    spec.topology.tensor = std::max(1, number_in(part_of(run.keys, file, "tensor_parallel"), file,
                                                 {"autotp_size", 1, 0, kMostRanks}));
  const json pipeline = part_of(run.keys, file, "pipeline");
  if (!pipeline.contains("stages") || pipeline["stages"] != "auto")
    spec.topology.pipeline = number_in(pipeline, file, {"stages", 0, 1, kMostRanks});
  const json experts = part_of(run.keys, file, "expert_parallel");
  const json enabled = experts.value("enabled", json(false));
  if (!enabled.is_boolean())
    refuse_config(file, "expert_parallel.enabled", "true or false", enabled);
  run.autoep = enabled.get<bool>();
  if (run.autoep)
    spec.topology.expert = number_in(experts, file, {"autoep_size", 1, 1, kMostRanks});
  return run;
}

TargetSpec share_world(const checkpoint::ShardedState& source, const RunConfig& run, int world) {
  if (run.autoep && source.expert_layout == checkpoint::ExpertLayout::kNative) {
    throw Error(
        ErrorInfo{.code = ErrorCode::kUsage,
                  .what = "The config enables AutoEP; the checkpoint has native MoE layers.",
                  .file = run.file,
                  .entry = "expert_parallel",
                  .next = "`isoshard migrate --to autoep` makes AutoEP's stacks of them"});
  }
  if (world < 1 || world > kMostRanks) {
    throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                          .what = "--to-config goes with --world N, the number of ranks.",
                          .expected = "a number from 1 to " + std::to_string(kMostRanks),
                          .found = std::to_string(world),
                          .next = "say --world"});
  }
  TargetSpec spec = run.spec;
  Topology& to = spec.topology;
  if (to.pipeline == 0) to.pipeline = source.topology.pipeline;
  if (to.tensor == 0) to.tensor = source.pipeline.present() ? source.topology.tensor : 1;
  const int64_t replica = int64_t{to.pipeline} * to.sequence * to.tensor;
  if (world % replica != 0) {
    throw Error(ErrorInfo{
        .code = ErrorCode::kUsage,
        .what = "--world is no multiple of the config's sequence_parallel_size times autotp_size "
                "times the pipeline stages.",
        .file = run.file,
        .expected = "a multiple of " + std::to_string(replica),
        .found = std::to_string(world)});
  }
  to.data = static_cast<int>(world / replica);
  return spec;
}

namespace {

// The number of key-value heads as AutoTP looks for it in a model's config.json.
int64_t heads_of(Session* session, const std::string& file) {
  const json config =
      checkpoint::parse_shallow_json(read_small_file(session->storage, file, 16 << 20), file);
  const json& text =
      config.is_object() && config.contains("text_config") ? config["text_config"] : config;
  for (const char* key :
       {"num_key_value_heads", "num_kv_heads", "multi_query_group_num", "n_head_kv", "kv_n_heads",
        "num_attention_heads", "n_heads", "attention_heads"}) {
    if (!text.is_object() || !text.contains(key) || text[key].is_null()) continue;
    if (text[key].is_number_integer() && text[key] > 0) return text[key].get<int64_t>();
    throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                          .what = "The model's config does not say its number of heads.",
                          .file = file,
                          .entry = key,
                          .expected = "a number above 0",
                          .found = text[key].dump()});
  }
  if (text.is_object()) return 0;
  throw Error(ErrorInfo{
      .code = ErrorCode::kUsage, .what = "The model's config is not a JSON object.", .file = file});
}

}  // namespace

void infer_heads(Session* session, const checkpoint::ShardedState& source, std::string model_config,
                 checkpoint::SplitOptions* options, std::vector<std::string>* inferred) {
  if (options->kv_heads >= 0) return;
  if (model_config.empty()) {
    const std::string beside =
        checkpoint::join(checkpoint::parent_folder(source.folder), "config.json");
    if (session->storage.is_file(beside)) model_config = beside;
  }
  if (model_config.empty()) return;
  options->kv_heads = heads_of(session, model_config);
  inferred->push_back("key-value heads: " + std::to_string(options->kv_heads) + ", as " +
                      quote(checkpoint::base_name(model_config)) + " says");
}

}  // namespace isoshard::tools
