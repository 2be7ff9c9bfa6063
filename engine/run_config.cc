// See run_config.h.
#include "engine/run_config.h"

#include <algorithm>
#include <cctype>
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

// A class that DeepSpeed builds from an object of the config, and the keys the object may have.
struct Keywords {
  std::string taker;
  std::set<std::string> names;
};

// One object of the config; what was not asked for is without effect.
class Section {
 public:
  Section(const Json* object, std::string path) : object_(object), path_(std::move(path)) {
    if (object_ != nullptr && !object_->is_object()) refuse(path_, "an object", object_->dump());
  }

  bool given() const { return object_ != nullptr; }
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
  // DeepSpeed passes such an object as keyword arguments: what the class does not take is a
  // TypeError there.
  void refuse_others(const Keywords& taken) const {
    if (object_ == nullptr) return;
    std::string list;
    for (const std::string& name : taken.names) list += (list.empty() ? "" : ", ") + name;
    for (const auto& [key, value] : object_->items()) {
      if (taken.names.contains(key)) continue;
      refuse(full(key), "what " + taken.taker + " takes: " + list,
             key + ", in DeepSpeed a TypeError");
    }
  }
  // For what the class takes, changes its arithmetic and is not simulated.
  void refuse_unless(const std::string& key, const Json& simulated) const {
    if (object_ == nullptr || !object_->contains(key) || object_->at(key) == simulated) return;
    refuse(full(key), simulated.dump() + ", which alone is simulated", object_->at(key).dump());
  }
  // For what was asked for and changes nothing.
  void disregard(const std::string& key) { used_.erase(key); }
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
  if (betas == nullptr || *betas == "auto") return;
  const bool good =
      betas->is_array() && betas->size() == 2 && (*betas)[0].is_number() && (*betas)[1].is_number();
  if (!good) refuse(params->full("betas"), "two numbers", betas->dump());
  o->beta1 = (*betas)[0].get<double>();
  o->beta2 = (*betas)[1].get<double>();
}

// DeepSpeed knows its own optimizers in capitals or not, torch's by their exact names
// (runtime/config.py: DEEPSPEED_OPTIMIZERS).
std::string optimizer_type(const std::string& given) {
  std::string lower = given;
  std::transform(lower.begin(), lower.end(), lower.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  if (lower == "adamw") return "AdamW";
  if (lower == "adam") return "Adam";
  if (lower == "lion") return "Lion";
  if (given != "SGD") {
    refuse("optimizer.type", "AdamW, Adam or Lion in capitals or not, or SGD", given);
  }
  return given;
}

// zero_use_cpu_optimizer (engine.py); a true cpu_offload stands for offload_optimizer on the cpu.
bool steps_on_cpu(Section* root) {
  Section zero = root->section("zero_optimization");
  const Json* old = zero.find("cpu_offload");
  if (old != nullptr && *old == true) return true;
  const Json* offload = zero.find("offload_optimizer");
  if (offload == nullptr || !offload->is_object() || !offload->contains("device")) return false;
  return offload->at("device") == "cpu" || offload->at("device") == "nvme";
}

// Which class _configure_basic_optimizer (engine.py) builds. It takes adam_w_mode, torch_adam and
// fp32_optimizer_states out before it builds an Adam, whichever that is.
Keywords optimizer_keywords(const std::string& type, Section* params, bool on_cpu) {
  if (type == "SGD") {
    return {"torch.optim.SGD",
            {"lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "foreach",
             "differentiable", "fused"}};
  }
  if (type == "Lion") {
    const std::string own = on_cpu ? "fp32_optimizer_states" : "set_grad_none";
    return {on_cpu ? "DeepSpeedCPULion" : "FusedLion", {"lr", "betas", "weight_decay", own}};
  }
  Keywords adam{on_cpu ? "DeepSpeedCPUAdam" : "FusedAdam",
                {"adam_w_mode", "torch_adam", "fp32_optimizer_states", "lr", "betas", "eps",
                 "weight_decay", "amsgrad"}};
  if (params->truth("torch_adam", false)) {
    adam.taker = "torch.optim.AdamW";
    adam.names.insert({"maximize", "foreach", "capturable", "differentiable", "fused"});
  } else {
    adam.names.insert("bias_correction");
    if (!on_cpu) adam.names.insert("set_grad_none");
  }
  return adam;
}

void refuse_optimizer_keys(Section* params, const std::string& type, bool on_cpu) {
  if (params->find("max_grad_norm") != nullptr) {
    refuse(params->full("max_grad_norm"), "gradient_clipping in its place",
           "max_grad_norm, in DeepSpeed a ValueError");
  }
  params->refuse_others(optimizer_keywords(type, params, on_cpu));
  for (const char* key : {"amsgrad", "maximize", "nesterov"}) params->refuse_unless(key, false);
  params->refuse_unless("bias_correction", true);
  params->refuse_unless("dampening", 0);
}

void read_adam(Section* params, OptimizerSettings* o) {
  // AdamW is the decoupled form whatever adam_w_mode says (engine.py, _configure_basic_optimizer).
  if (o->type == "Adam" && !params->truth("adam_w_mode", true)) {
    refuse(params->full("adam_w_mode"), "true: the decoupled form, which alone is simulated",
           "false: the decay is added to the gradient");
  }
  o->epsilon = params->real("eps", o->epsilon);
  // torch.optim.AdamW decays by 0.01 where nothing is given, FusedAdam and DeepSpeedCPUAdam do not.
  // Beyond that torch_adam changes nothing here: one order of operations is simulated.
  o->weight_decay = params->truth("torch_adam", false) ? 0.01 : 0.0;
}

void read_optimizer(Section* root, RunConfig* config) {
  Section section = root->section("optimizer");
  OptimizerSettings& o = config->optimizer;
  const Json* type = section.find("type");
  config->has_optimizer = type != nullptr && !type->is_null();
  if (config->has_optimizer) {
    o.type = optimizer_type(section.word("type", ""));
    const Json* given = section.find("params");
    const bool none = given == nullptr || given->is_null();  // DeepSpeed: no parameters either way
    Section params(none ? nullptr : given, section.full("params"));
    refuse_optimizer_keys(&params, o.type, steps_on_cpu(root));
    o.lr = params.real("lr", o.lr);
    if (o.type == "SGD") {
      o.momentum = params.real("momentum", o.momentum);
    } else {
      read_betas(&params, &o);
    }
    if (o.type == "Adam" || o.type == "AdamW") read_adam(&params, &o);
    o.weight_decay = params.real("weight_decay", o.weight_decay);
    params.tell_rest(&config->without_effect);
  }
  section.tell_rest(&config->without_effect);
}

// What the three classes take (runtime/lr_schedules.py) beside the optimizer.
Keywords schedule_keywords(const std::string& type) {
  const bool cosine = type == "WarmupCosineLR";
  Keywords taken{
      type,
      {"warmup_num_steps", "warmup_type", "last_batch_iteration",
       cosine ? "warmup_min_ratio" : "warmup_min_lr", cosine ? "cos_min_ratio" : "warmup_max_lr"}};
  if (type != "WarmupLR") taken.names.insert("total_num_steps");
  return taken;
}

// WarmupLR has the optimizer's lr as its warmup_max_lr where none is given, WarmupDecayLR 0.001;
// null and Hugging Face's "auto" mean the optimizer's lr in both. An unknown warmup_type is "log".
void read_schedule(Section* params, SchedulerSettings* s) {
  params->refuse_others(schedule_keywords(s->type));
  constexpr int64_t kMostSteps = 1'000'000'000;
  s->warmup_steps = params->whole("warmup_num_steps", s->warmup_steps, 1, kMostSteps);
  const std::string warmup = params->word("warmup_type", "log");
  s->log_warmup = warmup != "linear";
  if (warmup != "linear" && warmup != "log") params->disregard("warmup_type");
  if (s->type != "WarmupLR") {
    s->total_steps = params->whole("total_num_steps", 0, 1, kMostSteps);
    const Json* given = params->find("total_num_steps");
    if (s->total_steps == 0) {
      refuse(params->full("total_num_steps"), "a number of steps",
             given == nullptr ? "nothing" : given->dump());
    }
  }
  if (s->type == "WarmupCosineLR") {
    s->warmup_min_ratio = params->real("warmup_min_ratio", s->warmup_min_ratio);
    s->cosine_min_ratio = params->real("cos_min_ratio", s->cosine_min_ratio);
  } else {
    s->min_lr = params->real("warmup_min_lr", s->min_lr);
    const Json* most = params->find("warmup_max_lr");
    if (most == nullptr) {
      if (s->type == "WarmupDecayLR") s->max_lr = 1e-3;
    } else if (!most->is_null() && *most != "auto") {
      s->max_lr = params->real("warmup_max_lr", 0.0);
    }
  }
  const Json* start = params->find("last_batch_iteration");
  if (start != nullptr && *start != -1) {
    refuse(params->full("last_batch_iteration"), "-1: the schedule begins with the run",
           start->dump());
  }
}

void read_scheduler(Section* root, RunConfig* config) {
  Section section = root->section("scheduler");
  SchedulerSettings& s = config->scheduler;
  const Json* type = section.find("type");
  if (type != nullptr && !type->is_null()) {
    s.type = section.word("type", "");
    if (s.type != "WarmupLR" && s.type != "WarmupDecayLR" && s.type != "WarmupCosineLR") {
      refuse("scheduler.type", "WarmupLR, WarmupDecayLR or WarmupCosineLR", s.type);
    }
    Section params = section.section("params");
    if (!params.given()) refuse("scheduler.params", "an object", "nothing");
    read_schedule(&params, &s);
    params.tell_rest(&config->without_effect);
  }
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
  config.clip = root.real("gradient_clipping", config.clip);
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
