// See sample_model.h.
#include "tools/sample_model.h"

#include "core/error.h"
#include "engine/run_config.h"

namespace isoshard::tools {

reference::TrainConfig sample_model(const std::string& name, uint64_t seed) {
  reference::TrainConfig config;
  reference::ModelConfig& m = config.model;
  m.seed = seed;
  config.data.seed = seed;
  config.clip = 1.0;
  if (name == "tiny") return config;
  m.vocabulary = 64;
  m.hidden = 32;
  m.head_size = 8;
  m.intermediate = 48;
  m.dtype = DType::kBFloat16;
  config.data.batch = 8;
  m.tied = name == "llama-tied";
  if (name == "llama-frozen") m.frozen = 3;
  if (name == "llama" || m.tied || m.frozen > 0) return config;
  if (name == "mixtral") {
    m.hidden = 16;
    m.head_size = 4;
    m.experts = 8;
    m.expert_intermediate = 24;
    return config;
  }
  if (name == "llama-fp32") {
    m.dtype = DType::kFloat32;
    return config;
  }
  throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                        .what = "There is no such model.",
                        .entry = quote(name),
                        .expected = kSampleModels,
                        .next = "correct --model"});
}

namespace {

[[noreturn]] void refuse_contradiction(const std::string& entry, int text, int config) {
  throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                        .what = "--topology and --config contradict each other.",
                        .entry = entry,
                        .expected = std::to_string(config) + ", as the config has it",
                        .found = std::to_string(text),
                        .next = "leave " + entry + "= out of --topology"});
}

// The degree that the text or the config says; the other one is 0 or 1 then, or the same.
int degree(const char* axis, int text, int config) {
  if (text == 0 || text == config) return config;
  if (config == 1) return text;
  refuse_contradiction(axis, text, config);
}

void take_optimizer(const engine::RunConfig& from, reference::TrainConfig* config) {
  using reference::OptimizerKind;
  using reference::ScheduleKind;
  reference::OptimizerConfig& o = config->optimizer;
  if (from.has_optimizer) {
    const engine::OptimizerSettings& s = from.optimizer;
    o.kind = s.type == "SGD"    ? OptimizerKind::kSgd
             : s.type == "Lion" ? OptimizerKind::kLion
                                : OptimizerKind::kAdamW;
    o.lr = s.lr;
    o.beta1 = s.beta1;
    o.beta2 = s.beta2;
    o.epsilon = s.epsilon;
    o.momentum = s.momentum;
    o.weight_decay = s.weight_decay;
  }
  const engine::SchedulerSettings& s = from.scheduler;
  config->schedule.max_lr = s.max_lr.value_or(o.lr);
  if (s.type.empty()) return;
  config->schedule.kind = s.type == "WarmupLR"        ? ScheduleKind::kWarmup
                          : s.type == "WarmupDecayLR" ? ScheduleKind::kWarmupDecay
                                                      : ScheduleKind::kWarmupCosine;
  config->schedule.min_lr = s.min_lr;
  config->schedule.warmup_steps = s.warmup_steps;
  if (s.total_steps > 0) config->schedule.total_steps = s.total_steps;
  config->schedule.warmup_min_ratio = s.warmup_min_ratio;
  config->schedule.cosine_min_ratio = s.cosine_min_ratio;
  config->schedule.log_warmup = s.log_warmup;
}

// A sample run loads nothing, and its ranks all give the same tag: what these would change has no
// effect here.
void tell_checkpoint(const engine::Json& json, std::vector<std::string>* without_effect) {
  const auto section = json.find("checkpoint");
  if (section == json.end()) return;
  for (const char* key : {"load_universal", "tag_validation"}) {
    if (section->contains(key)) without_effect->push_back(std::string("checkpoint.") + key);
  }
}

}  // namespace

SampleRun sample_run(const std::string& model, uint64_t seed, const std::string& topology,
                     const std::string& deepspeed_config) {
  SampleRun run{.config = sample_model(model, seed), .topology = {}, .without_effect = {}};
  TargetSpec spec = parse_target(topology, "--topology");
  if (deepspeed_config.empty()) {
    run.topology = resolve(spec, Topology{});
    run.config.stage = spec.stage < 0 ? 1 : spec.stage;
    return run;
  }
  engine::Json json;
  try {
    json = engine::Json::parse(deepspeed_config);
  } catch (const nlohmann::json::exception& error) {
    throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                          .what = "The config is no JSON.",
                          .found = error.what(),
                          .next = "correct the file that --config names"});
  }
  const engine::RunConfig from = engine::read_run_config(json);
  spec.topology.tensor = degree("tp", spec.topology.tensor, from.tensor);
  spec.topology.sequence = degree("sp", spec.topology.sequence, from.sequence);
  spec.topology.expert = degree("ep", spec.topology.expert, from.expert);
  if (from.pipeline > 0) {
    spec.topology.pipeline = degree("pp", spec.topology.pipeline, from.pipeline);
  }
  run.topology = resolve(spec, Topology{});
  if (spec.stage >= 0 && spec.stage != from.stage) {
    refuse_contradiction("stage", spec.stage, from.stage);
  }
  run.config.stage = from.stage;
  run.config.model.dtype = from.dtype;
  run.config.loss_scale = from.loss_scale;
  run.config.clip = from.clip;
  take_optimizer(from, &run.config);
  if (from.batch > 0 || from.micro_batch > 0) {
    const engine::BatchSizes sizes = engine::batch_sizes(from, run.topology.data);
    constexpr int64_t kMostSamples = 4096;
    if (sizes.batch > kMostSamples) {
      throw Error(ErrorInfo{.code = ErrorCode::kLimit,
                            .what = "So large a batch is not simulated.",
                            .entry = "train_batch_size",
                            .expected = "up to " + std::to_string(kMostSamples) + " samples",
                            .found = std::to_string(sizes.batch),
                            .next = "give the config a smaller batch"});
    }
    run.config.data.batch = sizes.batch;
    run.config.data.micro_batch = sizes.micro_batch;
  }
  run.without_effect = from.without_effect;
  tell_checkpoint(json, &run.without_effect);
  return run;
}

}  // namespace isoshard::tools
