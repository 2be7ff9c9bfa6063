// A DeepSpeed config: what steers a run, what is refused, what is listed.
#include "engine/run_config.h"

#include <gtest/gtest.h>

#include <functional>

#include "core/error.h"

namespace isoshard::engine {
namespace {

std::string refused(const std::string& text) {
  try {
    read_run_config(Json::parse(text));
  } catch (const Error& error) {
    return error.info().entry;
  }
  return "nothing";
}

TEST(RunConfig, SteersARun) {
  const RunConfig c = read_run_config(Json::parse(R"({
    "train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.5,
    "zero_optimization": {"stage": 3, "overlap_comm": true, "reduce_bucket_size": "auto"},
    "tensor_parallel": {"autotp_size": 2}, "sequence_parallel_size": 1,
    "expert_parallel": {"enabled": true, "autoep_size": 4},
    "bf16": {"enabled": true, "immediate_grad_update": true},
    "optimizer": {"type": "Lion", "params": {"lr": 0.1, "betas": [0.8, 0.9], "caution": 1}},
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
            (std::vector<std::string>{"zero_optimization.overlap_comm",
                                      "zero_optimization.reduce_bucket_size",
                                      "bf16.immediate_grad_update", "optimizer.params.caution",
                                      "checkpoint.writer", "steps_per_print", "my_own"}));
  EXPECT_EQ(batch_sizes(c, 4).batch, 16);
  EXPECT_EQ(batch_sizes(c, 4).micro_batch, 2);
}

TEST(RunConfig, DefaultsAreDeepSpeeds) {
  const RunConfig c = read_run_config(Json::object());
  EXPECT_EQ(c.stage, 0);
  EXPECT_EQ(c.dtype, DType::kFloat32);
  EXPECT_FALSE(c.has_optimizer);
  EXPECT_EQ(c.tag_validation, TagValidation::kWarn);
  EXPECT_TRUE(c.without_effect.empty());
  const RunConfig half = read_run_config({{"fp16", {{"enabled", true}}}});
  EXPECT_TRUE(half.loss_scale.dynamic);
  EXPECT_EQ(half.loss_scale.scale, 65536.0);
  EXPECT_EQ(read_run_config({{"fp16", {{"enabled", true}, {"loss_scale", 8}}}}).loss_scale.scale,
            8.0);
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
  EXPECT_EQ(refused(R"({"scheduler": {"type": "WarmupCosineLR"}})"),
            "scheduler.params.total_num_steps");
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

}  // namespace
}  // namespace isoshard::engine
