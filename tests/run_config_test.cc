// A DeepSpeed config: what steers a run, what is refused, what is listed, and which rates its
// schedule gives.
#include "engine/run_config.h"

#include <gtest/gtest.h>

#include <functional>

#include "core/error.h"
#include "reference/schedule.h"

namespace isoshard::engine {
namespace {

ErrorInfo refusal(const std::string& text) {
  try {
    read_run_config(Json::parse(text));
  } catch (const Error& error) {
    return error.info();
  }
  return ErrorInfo{.entry = "nothing"};
}

std::string refused(const std::string& text) { return refusal(text).entry; }

TEST(RunConfig, SteersARun) {
  const RunConfig c = read_run_config(Json::parse(R"({
    "train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.5,
    "zero_optimization": {"stage": 3, "overlap_comm": true, "reduce_bucket_size": "auto"},
    "tensor_parallel": {"autotp_size": 2}, "sequence_parallel_size": 1,
    "expert_parallel": {"enabled": true, "autoep_size": 4},
    "bf16": {"enabled": true, "immediate_grad_update": true},
    "optimizer": {"type": "Lion",
                  "params": {"lr": 0.1, "betas": [0.8, 0.9], "set_grad_none": true}},
    "scheduler": {"type": "WarmupDecayLR",
                  "params": {"warmup_num_steps": 3, "total_num_steps": 9, "warmup_type": "linear"}},
    "checkpoint": {"load_universal": true, "tag_validation": "FAIL", "writer": {}},
    "steps_per_print": 10, "my_own": {"a": 1}})"));
  EXPECT_EQ(c.stage, 3);
  EXPECT_EQ(c.tensor, 2);
  EXPECT_EQ(c.expert, 4);
  EXPECT_EQ(c.dtype, DType::kBFloat16);
  EXPECT_EQ(c.clip, 0.5);
  EXPECT_EQ(c.optimizer.type, "Lion");
  EXPECT_EQ(c.optimizer.beta2, 0.9);
  EXPECT_EQ(c.scheduler.total_steps, 9);
  EXPECT_FALSE(c.scheduler.log_warmup);
  EXPECT_TRUE(c.load_universal);
  EXPECT_EQ(c.tag_validation, TagValidation::kFail);
  EXPECT_EQ(c.without_effect,
            (std::vector<std::string>{
                "zero_optimization.overlap_comm", "zero_optimization.reduce_bucket_size",
                "bf16.immediate_grad_update", "optimizer.params.set_grad_none", "checkpoint.writer",
                "steps_per_print", "my_own"}));
  EXPECT_EQ(batch_sizes(c, 4).batch, 16);
  EXPECT_EQ(batch_sizes(c, 4).micro_batch, 2);
}

TEST(RunConfig, DefaultsAreDeepSpeeds) {
  const RunConfig c = read_run_config(Json::object());
  EXPECT_EQ(c.stage, 0);
  EXPECT_EQ(c.dtype, DType::kFloat32);
  EXPECT_FALSE(c.has_optimizer);
  EXPECT_EQ(c.tag_validation, TagValidation::kWarn);
  EXPECT_EQ(c.clip, 1.0);  // runtime/constants.py: GRADIENT_CLIPPING_DEFAULT, in every stage
  EXPECT_EQ(read_run_config({{"gradient_clipping", 0}}).clip, 0.0);
  EXPECT_EQ(read_run_config({{"bf16", {{"enabled", true}}}}).clip, 1.0);
  EXPECT_TRUE(c.without_effect.empty());
  const RunConfig half = read_run_config({{"fp16", {{"enabled", true}}}});
  EXPECT_EQ(half.clip, 1.0);
  EXPECT_TRUE(half.loss_scale.dynamic);
  EXPECT_EQ(half.loss_scale.scale, 65536.0);
  EXPECT_EQ(read_run_config({{"fp16", {{"enabled", true}, {"loss_scale", 8}}}}).loss_scale.scale,
            8.0);
}

RunConfig optimized(const char* type, const Json& params = Json::object()) {
  return read_run_config({{"optimizer", {{"type", type}, {"params", params}}}});
}

// runtime/engine.py (_configure_basic_optimizer), ops/adam, ops/lion and torch.optim.
TEST(RunConfig, OptimizersDefaultsAreDeepSpeeds) {
  for (const char* type : {"AdamW", "Adam", "Lion", "SGD"}) {
    const OptimizerSettings o = optimized(type).optimizer;
    EXPECT_EQ(o.type, type);
    EXPECT_EQ(o.lr, 1e-3) << type;
    EXPECT_EQ(o.beta1, 0.9) << type;
    EXPECT_EQ(o.beta2, 0.999) << type;  // of Lion too
    EXPECT_EQ(o.epsilon, 1e-8) << type;
    EXPECT_EQ(o.momentum, 0.0) << type;
    EXPECT_EQ(o.weight_decay, 0.0) << type;
  }
  for (const char* type : {"AdamW", "Adam"}) {
    EXPECT_EQ(optimized(type, {{"torch_adam", true}}).optimizer.weight_decay, 0.01) << type;
    EXPECT_EQ(optimized(type, {{"torch_adam", false}}).optimizer.weight_decay, 0.0) << type;
    EXPECT_EQ(optimized(type, {{"weight_decay", 0.5}}).optimizer.weight_decay, 0.5) << type;
  }
}

// runtime/config.py lowers the names of DEEPSPEED_OPTIMIZERS; torch.optim knows SGD, not sgd.
TEST(RunConfig, OptimizersAreNamedAsDeepSpeedNamesThem) {
  for (const char* type : {"AdamW", "adamw", "ADAMW"}) {
    EXPECT_EQ(optimized(type).optimizer.type, "AdamW");
  }
  for (const char* type : {"Adam", "adam"}) EXPECT_EQ(optimized(type).optimizer.type, "Adam");
  for (const char* type : {"Lion", "lion", "LION"}) {
    EXPECT_EQ(optimized(type).optimizer.type, "Lion");
  }
  EXPECT_EQ(optimized("SGD").optimizer.type, "SGD");
  for (const char* type : {"sgd", "Sgd", "", "AdamW "}) {
    EXPECT_THROW(optimized(type), Error) << type;
  }
  EXPECT_FALSE(read_run_config({{"optimizer", {{"type", nullptr}}}}).has_optimizer);
}

TEST(RunConfig, AdamIsDecoupledOrRefused) {
  EXPECT_EQ(optimized("adam", {{"adam_w_mode", true}}).optimizer.type, "Adam");
  EXPECT_EQ(refused(R"({"optimizer": {"type": "adam", "params": {"adam_w_mode": false}}})"),
            "optimizer.params.adam_w_mode");
  const RunConfig c = optimized("adamw", {{"adam_w_mode", false}});
  EXPECT_EQ(c.optimizer.type, "AdamW");
  EXPECT_EQ(c.without_effect, std::vector<std::string>{"optimizer.params.adam_w_mode"});
}

ErrorInfo optimizer_refusal(const char* type, const Json& params, const Json& zero = nullptr) {
  Json config;
  config["optimizer"] = {{"type", type}, {"params", params}};
  if (!zero.is_null()) config["zero_optimization"] = zero;
  return refusal(config.dump());
}

Json offload_to(const char* device) { return {{"offload_optimizer", {{"device", device}}}}; }

// The signatures of torch.optim.AdamW and SGD, of FusedAdam, DeepSpeedCPUAdam, FusedLion and
// DeepSpeedCPULion, as _configure_basic_optimizer calls them.
TEST(RunConfig, ParametersThatTheOptimizerDoesNotTakeAreRefused) {
  const auto expect_type_error = [](const char* type, Json params, const std::string& key,
                                    const std::string& taker, const Json& zero = nullptr) {
    params[key] = 1;
    const ErrorInfo info = optimizer_refusal(type, params, zero);
    EXPECT_EQ(info.entry, "optimizer.params." + key) << taker;
    EXPECT_NE(info.expected.find(taker + " takes"), std::string::npos) << info.expected;
    EXPECT_NE(info.found.find("TypeError"), std::string::npos) << info.found;
  };
  const Json none = Json::object(), torch = {{"torch_adam", true}};
  const Json old = {{"cpu_offload", true}};
  for (const char* key : {"eps", "torch_adam", "adam_w_mode", "fp32_optimizer_states"}) {
    expect_type_error("Lion", none, key, "FusedLion");
  }
  expect_type_error("lion", none, "set_grad_none", "DeepSpeedCPULion", offload_to("nvme"));
  for (const char* key : {"betas", "eps", "capturable", "set_grad_none"}) {
    expect_type_error("SGD", none, key, "torch.optim.SGD", offload_to("cpu"));
  }
  for (const char* type : {"Adam", "AdamW"}) {
    for (const char* key : {"foreach", "fused", "maximize", "momentum", "adamw_mode"}) {
      expect_type_error(type, none, key, "FusedAdam");
    }
    expect_type_error(type, none, "set_grad_none", "DeepSpeedCPUAdam", old);
    for (const char* key : {"bias_correction", "set_grad_none", "momentum"}) {
      expect_type_error(type, torch, key, "torch.optim.AdamW");
    }
  }
  for (const char* type : {"AdamW", "Lion", "SGD"}) {
    const ErrorInfo info = optimizer_refusal(type, {{"max_grad_norm", 1.0}});
    EXPECT_EQ(info.entry, "optimizer.params.max_grad_norm") << type;
    EXPECT_NE(info.found.find("ValueError"), std::string::npos) << info.found;
  }
}

TEST(RunConfig, ParametersThatChangeTheArithmeticAreRefused) {
  const auto refused_key = [](const char* type, const Json& params) {
    return optimizer_refusal(type, params).entry;
  };
  EXPECT_EQ(refused_key("AdamW", {{"amsgrad", true}}), "optimizer.params.amsgrad");
  EXPECT_EQ(refused_key("AdamW", {{"bias_correction", false}}), "optimizer.params.bias_correction");
  EXPECT_EQ(refused_key("AdamW", {{"torch_adam", true}, {"maximize", true}}),
            "optimizer.params.maximize");
  EXPECT_EQ(refused_key("SGD", {{"momentum", 0.5}, {"nesterov", true}}),
            "optimizer.params.nesterov");
  EXPECT_EQ(refused_key("SGD", {{"momentum", 0.5}, {"dampening", 0.5}}),
            "optimizer.params.dampening");
  EXPECT_EQ(refused_key("SGD", {{"maximize", true}}), "optimizer.params.maximize");
}

TEST(RunConfig, ParametersThatLeaveTheArithmeticAreWithoutEffect) {
  const auto listed = [](const char* type, const Json& params, const Json& zero = Json::object()) {
    std::vector<std::string> keys =
        read_run_config(
            {{"optimizer", {{"type", type}, {"params", params}}}, {"zero_optimization", zero}})
            .without_effect;
    std::erase_if(keys, [](const std::string& key) { return !key.starts_with("optimizer."); });
    return keys;
  };
  using Keys = std::vector<std::string>;
  EXPECT_EQ(listed("AdamW", {{"amsgrad", false}, {"bias_correction", true}}),
            (Keys{"optimizer.params.amsgrad", "optimizer.params.bias_correction"}));
  EXPECT_EQ(listed("AdamW", {{"torch_adam", true}, {"foreach", false}, {"fused", true}}),
            (Keys{"optimizer.params.foreach", "optimizer.params.fused"}));
  EXPECT_EQ(listed("Adam", {{"set_grad_none", false}, {"fp32_optimizer_states", true}}),
            (Keys{"optimizer.params.set_grad_none", "optimizer.params.fp32_optimizer_states"}));
  EXPECT_EQ(listed("Lion", {{"fp32_optimizer_states", true}}, offload_to("cpu")),
            Keys{"optimizer.params.fp32_optimizer_states"});
  EXPECT_EQ(listed("SGD", {{"dampening", 0.0}, {"nesterov", false}, {"differentiable", true}}),
            (Keys{"optimizer.params.dampening", "optimizer.params.nesterov",
                  "optimizer.params.differentiable"}));
  const Json nameless = {{"optimizer", {{"params", {{"max_grad_norm", 1}}}}},
                         {"scheduler", {{"params", {{"cos_min_ratio", 1}}}}}};
  EXPECT_EQ(read_run_config(nameless).without_effect,
            (Keys{"optimizer.params", "scheduler.params"}));
}

// Looking for the offload leaves it listed.
TEST(RunConfig, OffloadIsWithoutEffect) {
  const RunConfig c = read_run_config({{"zero_optimization", offload_to("cpu")},
                                       {"optimizer", {{"type", "AdamW"}, {"params", nullptr}}}});
  EXPECT_EQ(c.without_effect, std::vector<std::string>{"zero_optimization.offload_optimizer"});
  const Json none = {{"offload_optimizer", nullptr}};
  EXPECT_EQ(optimizer_refusal("AdamW", {{"set_grad_none", true}}, none).entry, "nothing");
}

TEST(RunConfig, NullParametersAndAutoAreDefaults) {
  const OptimizerSettings none = optimized("AdamW", nullptr).optimizer;
  EXPECT_EQ(none.lr, 1e-3);
  EXPECT_EQ(none.weight_decay, 0.0);
  const RunConfig c = optimized(
      "AdamW", {{"lr", "auto"}, {"betas", "auto"}, {"eps", "auto"}, {"weight_decay", "auto"}});
  EXPECT_EQ(c.optimizer.beta1, 0.9);
  EXPECT_EQ(c.optimizer.beta2, 0.999);
  EXPECT_TRUE(c.without_effect.empty());
}

RunConfig scheduled(const char* type, const Json& params) {
  return read_run_config({{"scheduler", {{"type", type}, {"params", params}}}});
}

// runtime/lr_schedules.py.
TEST(RunConfig, SchedulesDefaultsAreDeepSpeeds) {
  const SchedulerSettings warmup = scheduled("WarmupLR", Json::object()).scheduler;
  EXPECT_EQ(warmup.min_lr, 0.0);
  EXPECT_FALSE(warmup.max_lr.has_value());
  EXPECT_EQ(warmup.warmup_steps, 1000);
  EXPECT_TRUE(warmup.log_warmup);
  const Json total = {{"total_num_steps", 9}};
  EXPECT_EQ(scheduled("WarmupDecayLR", total).scheduler.max_lr, 1e-3);
  const SchedulerSettings cosine = scheduled("WarmupCosineLR", total).scheduler;
  EXPECT_EQ(cosine.warmup_min_ratio, 0.0);
  EXPECT_EQ(cosine.cosine_min_ratio, 1e-4);
  EXPECT_FALSE(cosine.max_lr.has_value());
  const Json none = {{"total_num_steps", 9}, {"warmup_max_lr", nullptr}};
  EXPECT_FALSE(scheduled("WarmupDecayLR", none).scheduler.max_lr.has_value());
}

TEST(RunConfig, ACosineIsGivenByRatiosOfTheOptimizersRate) {
  const RunConfig c = scheduled("WarmupCosineLR", {{"total_num_steps", 9},
                                                   {"warmup_min_ratio", 0.25},
                                                   {"cos_min_ratio", 0.5},
                                                   {"warmup_num_steps", 3},
                                                   {"last_batch_iteration", -1}});
  EXPECT_EQ(c.scheduler.warmup_min_ratio, 0.25);
  EXPECT_EQ(c.scheduler.cosine_min_ratio, 0.5);
  EXPECT_FALSE(c.scheduler.max_lr.has_value());
  EXPECT_TRUE(c.without_effect.empty());
}

ErrorInfo schedule_refusal(const std::string& type, const Json& params) {
  Json config;
  config["scheduler"] = {{"type", type}, {"params", params}};
  return refusal(config.dump());
}

TEST(RunConfig, AnotherSchedulesParametersAreRefused) {
  const auto expect_type_error = [](const std::string& type, const std::string& key) {
    Json params;
    params[key] = 1;
    if (type != "WarmupLR") params["total_num_steps"] = 9;
    const ErrorInfo info = schedule_refusal(type, params);
    EXPECT_EQ(info.entry, "scheduler.params." + key) << type;
    EXPECT_NE(info.expected.find(type + " takes"), std::string::npos) << info.expected;
    EXPECT_NE(info.found.find("TypeError"), std::string::npos) << info.found;
  };
  for (const char* key : {"total_num_steps", "cos_min_ratio", "warmup_min_ratio", "optimizer"}) {
    expect_type_error("WarmupLR", key);
  }
  for (const char* key : {"cos_min_ratio", "warmup_min_ratio"}) {
    expect_type_error("WarmupDecayLR", key);
  }
  for (const char* key : {"warmup_min_lr", "warmup_max_lr"}) {
    expect_type_error("WarmupCosineLR", key);
  }
}

TEST(RunConfig, AnUnknownWarmUpIsLogarithmic) {
  const RunConfig c = scheduled("WarmupLR", {{"warmup_type", "cubic"}});
  EXPECT_TRUE(c.scheduler.log_warmup);
  EXPECT_EQ(c.without_effect, std::vector<std::string>{"scheduler.params.warmup_type"});
}

TEST(RunConfig, AMissingTotalIsToldFromOneThatIsAuto) {
  const auto found = [](const Json& params) {
    return schedule_refusal("WarmupDecayLR", params).found;
  };
  EXPECT_EQ(found(Json::object()), "nothing");
  EXPECT_EQ(found({{"total_num_steps", "auto"}}), "\"auto\"");
}

TEST(RunConfig, CountsThePipelinesStages) {
  EXPECT_EQ(read_run_config(Json::object()).pipeline, 0);
  EXPECT_EQ(read_run_config({{"pipeline", {{"stages", "auto"}}}}).pipeline, 0);
  const RunConfig c = read_run_config({{"pipeline", {{"stages", 3}, {"seed_layers", true}}}});
  EXPECT_EQ(c.pipeline, 3);
  EXPECT_EQ(c.without_effect, std::vector<std::string>{"pipeline.seed_layers"});
}

TEST(RunConfig, RefusesByKey) {
  EXPECT_EQ(refused(R"({"zero_optimization": {"stage": 4}})"), "zero_optimization.stage");
  EXPECT_EQ(refused(R"({"zero_optimization": {"stage": "2"}})"), "zero_optimization.stage");
  EXPECT_EQ(refused(R"({"zero_optimization": 2})"), "zero_optimization");
  EXPECT_EQ(refused(R"({"bf16": {"enabled": true}, "fp16": {"enabled": true}})"),
            "bf16.enabled, fp16.enabled");
  EXPECT_EQ(refused(R"({"optimizer": {"type": "Muon"}})"), "optimizer.type");
  EXPECT_EQ(refused(R"({"optimizer": {"type": "AdamW", "params": {"betas": 1}}})"),
            "optimizer.params.betas");
  EXPECT_EQ(refused(R"({"scheduler": {"type": "OneCycle"}})"), "scheduler.type");
  EXPECT_EQ(refused(R"({"scheduler": {"type": "WarmupCosineLR", "params": {}}})"),
            "scheduler.params.total_num_steps");
  EXPECT_EQ(refused(R"({"scheduler": {"type": "WarmupLR"}})"), "scheduler.params");
  EXPECT_EQ(
      refused(R"({"scheduler": {"type": "WarmupLR", "params": {"last_batch_iteration": 2}}})"),
      "scheduler.params.last_batch_iteration");
  EXPECT_EQ(refused(R"({"gradient_clipping": -1})"), "gradient_clipping");
  EXPECT_EQ(refused(R"({"train_batch_size": 1e30})"), "train_batch_size");
  EXPECT_EQ(refused(R"({"checkpoint": {"tag_validation": "FOO"}})"), "checkpoint.tag_validation");
}

TEST(RunConfig, BatchesAddUpOrAreRefused) {
  const auto sizes = [](int64_t batch, int64_t micro, int64_t accumulation, int ranks) {
    RunConfig c;
    c.batch = batch;
    c.micro_batch = micro;
    c.accumulation = accumulation;
    const BatchSizes s = batch_sizes(c, ranks);
    return std::pair(s.batch, s.micro_batch);
  };
  EXPECT_EQ(sizes(16, 0, 0, 4), std::pair(int64_t{16}, int64_t{4}));
  EXPECT_EQ(sizes(16, 0, 2, 4), std::pair(int64_t{16}, int64_t{2}));
  EXPECT_EQ(sizes(0, 3, 0, 4), std::pair(int64_t{12}, int64_t{3}));
  EXPECT_EQ(sizes(0, 3, 2, 4), std::pair(int64_t{24}, int64_t{3}));
  EXPECT_EQ(sizes(24, 3, 0, 4), std::pair(int64_t{24}, int64_t{3}));
  EXPECT_THROW(sizes(16, 3, 2, 4), Error);
  EXPECT_THROW(sizes(3, 0, 0, 4), Error);
  EXPECT_THROW(sizes(0, 0, 2, 4), Error);
}

// The rates in an optimizer before its steps 1, 2, … as the classes of DeepSpeed 0.19.8
// (deepspeed/runtime/lr_schedules.py) set them.
void expect_rates(const reference::ScheduleConfig& config, const std::vector<double>& rates) {
  for (size_t i = 0; i < rates.size(); ++i) {
    EXPECT_DOUBLE_EQ(learning_rate(config, static_cast<int64_t>(i) - 1), rates[i]) << i;
  }
}

TEST(Schedule, ACosineWarmsUpFromItsRatioBehindAFirstStepOfZero) {
  reference::ScheduleConfig c{.kind = reference::ScheduleKind::kWarmupCosine,
                              .max_lr = 0.02,
                              .warmup_steps = 4,
                              .total_steps = 10,
                              .warmup_min_ratio = 0.1,
                              .cosine_min_ratio = 0.05};
  expect_rates(c, {0.0, 0.002, 0.006500000000000001, 0.011000000000000001, 0.015500000000000002,
                   0.01872724133595217, 0.01525, 0.0105, 0.005750000000000002,
                   0.0022727586640478325, 0.001, 0.001, 0.001, 0.001});
  c.log_warmup = true;
  c.warmup_steps = 5;
  c.warmup_min_ratio = 0.25;
  c.cosine_min_ratio = 0.0;
  expect_rates(c, {0.0, 0.005, 0.011460148371100896, 0.015239092917289782, 0.017920296742201792,
                   0.02, 0.018090169943749474, 0.013090169943749475, 0.006909830056250526,
                   0.0019098300562505265, 0.0, 0.0, 0.0, 0.0});
}

TEST(Schedule, AWarmUpLastsTwoStepsAtLeast) {
  reference::ScheduleConfig c{.kind = reference::ScheduleKind::kWarmupCosine,
                              .max_lr = 0.003,
                              .warmup_steps = 1,
                              .total_steps = 6,
                              .cosine_min_ratio = 0.0001,
                              .log_warmup = true};
  expect_rates(c, {0.0, 0.0, 0.003, 0.0025607041057626435, 0.00150015, 0.0004395958942373568,
                   3.0000000000000004e-07, 3.0000000000000004e-07});
  c.kind = reference::ScheduleKind::kWarmupDecay;
  c.min_lr = 0.0001;
  c.max_lr = 0.01;
  expect_rates(c, {0.0001, 0.0001, 0.01, 0.01, 0.007525000000000001, 0.005050000000000001, 0.002575,
                   0.0001});
}

TEST(Schedule, ACosineShorterThanItsWarmUpEndsAtItsRatio) {
  const reference::ScheduleConfig c{.kind = reference::ScheduleKind::kWarmupCosine,
                                    .max_lr = 0.003,
                                    .warmup_steps = 3,
                                    .total_steps = 2,
                                    .cosine_min_ratio = 0.0001};
  expect_rates(c, {0.0, 0.0, 0.001, 0.002, 3.0000000000000004e-07, 3.0000000000000004e-07});
}

TEST(Schedule, AWarmUpAndADecayAreDeepSpeeds) {
  reference::ScheduleConfig c{.kind = reference::ScheduleKind::kWarmup,
                              .min_lr = 0.001,
                              .max_lr = 0.03,
                              .warmup_steps = 3,
                              .total_steps = 6,
                              .log_warmup = true};
  expect_rates(c, {0.001, 0.001, 0.019296962853572262, 0.03, 0.03, 0.03});
  c.kind = reference::ScheduleKind::kWarmupDecay;
  c.min_lr = 0.0;
  c.max_lr = 0.5;
  expect_rates(
      c, {0.0, 0.0, 0.31546487678572865, 0.5, 0.5, 0.3333333333333333, 0.16666666666666666, 0.0});
}

}  // namespace
}  // namespace isoshard::engine
