// See run_config.h.
#include "engine/run_config.h"

#include <set>

#include "core/error.h"

namespace isoshard::engine {
namespace {

[[noreturn]] void refuse(const std::string& key, const std::string& expected,
                         const std::string& found) {
  throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                        .what = "The config has a value that is none (DeepSpeed refuses it too, or "
                                "it is not simulated).",
                        .entry = key,
                        .expected = expected,
                        .found = found,
                        .next = "correct the config"});
}

// One object of the config; what was not asked for is without effect.
class Section {
 public:
  Section(const Json* object, std::string path) : object_(object), path_(std::move(path)) {
    if (object_ != nullptr && !object_->is_object()) refuse(path_, "an object", object_->dump());
  }

  const Json* find(const std::string& key) {
    if (object_ == nullptr) return nullptr;
    const auto found = object_->find(key);
    if (found == object_->end()) return nullptr;
    used_.insert(key);
    return &*found;
  }
  Section section(const std::string& key) { return {find(key), full(key)}; }
  bool truth(const std::string& key, bool other) {
    const Json* value = find(key);
    if (value == nullptr) return other;
    if (!value->is_boolean()) refuse(full(key), "true or false", value->dump());
    return value->get<bool>();
  }
  int64_t whole(const std::string& key, int64_t other, int64_t least, int64_t most) {
    const Json* value = find(key);
    if (value == nullptr || *value == "auto") return other;
    const bool good = value->is_number_integer() &&
                      value->get<double>() >= static_cast<double>(least) &&
                      value->get<double>() <= static_cast<double>(most);
    if (!good) {
      refuse(full(key), std::to_string(least) + " to " + std::to_string(most), value->dump());
    }
    return value->get<int64_t>();
  }
  double real(const std::string& key, double other) {
    const Json* value = find(key);
    if (value == nullptr || *value == "auto") return other;
    if (!value->is_number() || !(value->get<double>() >= 0)) {
      refuse(full(key), "a number of 0 or more", value->dump());
    }
    return value->get<double>();
  }
  std::string word(const std::string& key, const std::string& other) {
    const Json* value = find(key);
    if (value == nullptr) return other;
    if (!value->is_string()) refuse(full(key), "a text", value->dump());
    return value->get<std::string>();
  }
  std::string full(const std::string& key) const { return path_.empty() ? key : path_ + "." + key; }
  void tell_rest(std::vector<std::string>* list) const {
    if (object_ == nullptr) return;
    for (const auto& [key, value] : object_->items()) {
      if (!used_.contains(key)) list->push_back(full(key));
    }
  }

 private:
  const Json* object_;
  std::string path_;
  std::set<std::string> used_;
};

void read_betas(Section* params, OptimizerSettings* o) {
  const Json* betas = params->find("betas");
  if (betas == nullptr) return;
  const bool good =
      betas->is_array() && betas->size() == 2 && (*betas)[0].is_number() && (*betas)[1].is_number();
  if (!good) refuse(params->full("betas"), "two numbers", betas->dump());
  o->beta1 = (*betas)[0].get<double>();
  o->beta2 = (*betas)[1].get<double>();
}

void read_optimizer(Section* root, RunConfig* config) {
  Section section = root->section("optimizer");
  OptimizerSettings& o = config->optimizer;
  const std::string type = section.word("type", "");
  config->has_optimizer = !type.empty();
  if (config->has_optimizer) {
    o.type = type;
    if (type == "Lion") o.beta2 = 0.99;
    if (type != "AdamW" && type != "Adam" && type != "SGD" && type != "Lion") {
      refuse("optimizer.type", "AdamW, Adam, SGD or Lion", type);
    }
  }
  Section params = section.section("params");
  o.lr = params.real("lr", o.lr);
  o.weight_decay = params.real("weight_decay", type == "AdamW" ? 0.01 : 0.0);
  if (type == "SGD") {
    o.momentum = params.real("momentum", 0.0);
  } else {
    read_betas(&params, &o);
    o.epsilon = params.real("eps", o.epsilon);
  }
  if (type == "Adam" && !params.truth("adam_w_mode", true)) {
    refuse("optimizer.params.adam_w_mode", "true: the decoupled form", "false");
  }
  params.truth("torch_adam", false);  // the same bits are simulated either way
  params.tell_rest(&config->without_effect);
  section.tell_rest(&config->without_effect);
}

void read_scheduler(Section* root, RunConfig* config) {
  Section section = root->section("scheduler");
  SchedulerSettings& s = config->scheduler;
  s.type = section.word("type", "");
  if (!s.type.empty() && s.type != "WarmupLR" && s.type != "WarmupDecayLR" &&
      s.type != "WarmupCosineLR") {
    refuse("scheduler.type", "WarmupLR, WarmupDecayLR or WarmupCosineLR", s.type);
  }
  Section params = section.section("params");
  s.min_lr = params.real("warmup_min_lr", s.min_lr);
  s.max_lr = params.real("warmup_max_lr", s.max_lr);
  s.warmup_steps = params.whole("warmup_num_steps", s.warmup_steps, 1, 1'000'000'000);
  s.total_steps = params.whole("total_num_steps", s.total_steps, 1, 1'000'000'000);
  s.cosine_min_ratio = params.real("cos_min_ratio", s.cosine_min_ratio);
  const std::string warmup = params.word("warmup_type", "log");
  if (warmup != "log" && warmup != "linear") {
    refuse("scheduler.params.warmup_type", "log or linear", warmup);
  }
  s.log_warmup = warmup == "log";
  if ((s.type == "WarmupDecayLR" || s.type == "WarmupCosineLR") && s.total_steps == 0) {
    refuse("scheduler.params.total_num_steps", "a number of steps", "nothing");
  }
  params.tell_rest(&config->without_effect);
  section.tell_rest(&config->without_effect);
}

void read_dtype(Section* root, RunConfig* config) {
  Section bf16 = root->section("bf16"), fp16 = root->section("fp16");
  const bool brain = bf16.truth("enabled", false), half = fp16.truth("enabled", false);
  if (brain && half) refuse("bf16.enabled, fp16.enabled", "one of them", "both");
  if (brain) config->dtype = DType::kBFloat16;
  if (half) config->dtype = DType::kFloat16;
  const double scale = fp16.real("loss_scale", 0.0);
  const int64_t power = fp16.whole("initial_scale_power", 16, 0, 60);
  LossScale& s = config->loss_scale;
  s.window = fp16.whole("loss_scale_window", 1000, 1, 1'000'000'000);
  s.hysteresis = s.hysteresis_left = fp16.whole("hysteresis", 2, 1, 1'000'000);
  s.least = fp16.real("min_loss_scale", 1.0);
  if (half) {
    s.dynamic = scale == 0.0;
    s.scale = s.dynamic ? static_cast<double>(int64_t{1} << power) : scale;
  }
  bf16.tell_rest(&config->without_effect);
  fp16.tell_rest(&config->without_effect);
}

}  // namespace

RunConfig read_run_config(const Json& json) {
  RunConfig config;
  Section root(&json, "");
  Section zero = root.section("zero_optimization");
  config.stage = static_cast<int>(zero.whole("stage", 0, 0, 3));
  zero.tell_rest(&config.without_effect);
  Section tensor = root.section("tensor_parallel");
  config.tensor = static_cast<int>(tensor.whole("autotp_size", 1, 1, 4096));
  tensor.tell_rest(&config.without_effect);
  config.sequence = static_cast<int>(root.whole("sequence_parallel_size", 1, 1, 4096));
  Section expert = root.section("expert_parallel");
  const bool experts = expert.truth("enabled", false);
  const int64_t size = expert.whole("autoep_size", 1, 1, 4096);
  if (experts) config.expert = static_cast<int>(size);
  expert.tell_rest(&config.without_effect);
  Section pipeline = root.section("pipeline");
  config.pipeline = static_cast<int>(pipeline.whole("stages", 0, 1, 4096));
  pipeline.tell_rest(&config.without_effect);
  config.clip = root.real("gradient_clipping", 0.0);
  config.batch = root.whole("train_batch_size", 0, 1, 1'000'000'000);
  config.micro_batch = root.whole("train_micro_batch_size_per_gpu", 0, 1, 1'000'000'000);
  config.accumulation = root.whole("gradient_accumulation_steps", 0, 1, 1'000'000'000);
  read_dtype(&root, &config);
  read_optimizer(&root, &config);
  read_scheduler(&root, &config);
  Section files = root.section("checkpoint");
  config.load_universal = files.truth("load_universal", false);
  files.find("tag_validation");
  config.tag_validation = tag_validation(json);
  files.tell_rest(&config.without_effect);
  root.tell_rest(&config.without_effect);
  return config;
}

BatchSizes batch_sizes(const RunConfig& c, int data_ranks) {
  const auto refuse_batch = [&](const std::string& expected, const std::string& found) {
    refuse("train_batch_size, train_micro_batch_size_per_gpu, gradient_accumulation_steps",
           expected, found);
  };
  const int64_t ranks = data_ranks;
  if (c.batch == 0 && c.micro_batch == 0) refuse_batch("one of the first two", "neither");
  int64_t micro = c.micro_batch, steps = c.accumulation, batch = c.batch;
  if (micro == 0) {
    if (steps == 0) steps = 1;
    micro = batch / (steps * ranks);
  } else if (batch == 0) {
    if (steps == 0) steps = 1;
    batch = micro * steps * ranks;
  } else if (steps == 0) {
    steps = batch / (micro * ranks);
  }
  if (micro < 1 || steps < 1 || micro * steps * ranks != batch) {
    refuse_batch("batch = micro batch · accumulation · dp",
                 std::to_string(batch) + " and " + std::to_string(micro) + " · " +
                     std::to_string(steps) + " · " + std::to_string(ranks) + " = " +
                     std::to_string(micro * steps * ranks));
  }
  return {batch, micro};
}

}  // namespace isoshard::engine
