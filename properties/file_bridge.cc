// See file_bridge.h.
#include "properties/file_bridge.h"

#include "checkpoint/deepspeed/reader.h"
#include "checkpoint/deepspeed/reshard_target.h"
#include "checkpoint/small_file.h"
#include "reshard/executor.h"

namespace isoshard::properties {
namespace {

using engine::CheckpointEngine;
using engine::Json;
using reference::TrainConfig;
using reference::Trainer;

constexpr const char* kFixed = "isoshard_fixed_exponents";

bool is_pipeline_module(const TrainConfig& config, const Leg& leg) {
  return config.pipeline_module || leg.topology.pipeline > 1;
}

}  // namespace

Json client_state(const TrainingState& state) {
  Json json = Json::object();
  for (const auto& [tensor, largest] : state.fixed_largest) {
    json[kFixed][tensor] = static_cast<double>(largest);
  }
  return json;
}

void take_client_state(const Json& json, TrainingState* state) {
  state->fixed_largest.clear();
  if (!json.contains(kFixed)) return;
  for (const auto& [tensor, largest] : json.at(kFixed).items()) {
    state->fixed_largest.emplace_back(tensor, static_cast<float>(largest.get<double>()));
  }
}

std::string to_string(const Leg& leg) {
  return isoshard::to_string(leg.topology) + " stage " + std::to_string(leg.stage);
}

ParallelState parallel_state(sim::Rank& rank) {
  return {.topology = rank.topology(),
          .rank = rank.number(),
          .at = coordinate_of(rank.topology(), rank.number()),
          .world = &rank.group(GroupKind::kWorld),
          .zero = &rank.group(GroupKind::kZero),
          .sequence = &rank.group(GroupKind::kSequence),
          .tensor = &rank.group(GroupKind::kTensor),
          .pipeline = &rank.group(GroupKind::kPipeline),
          .expert = &rank.group(GroupKind::kExpert),
          .expert_data = &rank.group(GroupKind::kExpertData)};
}

Json deepspeed_config(const TrainConfig& config, const Topology& topology, int stage) {
  const reference::OptimizerConfig& o = config.optimizer;
  Json json;
  json["train_micro_batch_size_per_gpu"] = config.data.micro_batch;
  json["train_batch_size"] = config.data.batch;
  json["gradient_clipping"] = config.clip;
  json["zero_optimization"] = {{"stage", stage}};
  Json params = {{"lr", o.lr}, {"weight_decay", o.weight_decay}};
  if (o.kind == reference::OptimizerKind::kAdamW) params["torch_adam"] = true;
  if (o.kind == reference::OptimizerKind::kSgd) params["momentum"] = o.momentum;
  if (o.kind != reference::OptimizerKind::kCustom) {  // the script makes that one
    json["optimizer"] = {{"type", reference::name(o.kind)}, {"params", params}};
  }
  if (config.model.dtype == DType::kBFloat16) json["bf16"] = {{"enabled", true}};
  if (config.model.dtype == DType::kFloat16) json["fp16"] = {{"enabled", true}};
  if (topology.tensor > 1) {
    Json& tensor = json["tensor_parallel"] = {{"autotp_size", topology.tensor}};
    if (config.model.experts > 0) {  // of these models DeepSpeed knows nothing to cut by itself
      const auto spec = [](const char* pattern, const char* type) {
        return Json{{"patterns", {pattern}}, {"partition_type", type}};
      };
      tensor["partition_config"] = {
          {"use_default_specs", false},
          {"layer_specs",
           {spec(".*\\.(q|k|v)_proj\\.weight$", "column"), spec("lm_head\\.weight$", "column"),
            spec(".*\\.o_proj\\.weight$", "row")}}};
    }
  }
  if (topology.sequence > 1) json["sequence_parallel_size"] = topology.sequence;
  if (config.model.experts > 0) {
    json["expert_parallel"] = {{"enabled", true}, {"autoep_size", topology.expert}};
  }
  return json;
}

// A run of one tensor-parallel rank does not record how its tensors are cut: one of two does.
std::string FileBridge::donor_of_splits() {
  const std::string folder = "/donor";
  if (storage_.is_directory(folder)) return folder;
  TrainConfig config = config_;
  config.stage = 1;
  sim::Cluster cluster({.tensor = 2}, {.seed = seed_});
  cluster.run([&](sim::Rank& rank) {
    const ParallelState parallel = parallel_state(rank);
    Trainer trainer(config, parallel);
    trainer.initialise();
    CheckpointEngine(storage_, parallel, deepspeed_config(config, rank.topology(), 1),
                     [](const std::string&) {})
        .save_checkpoint(trainer.state(), folder, {});
  });
  return folder;
}

// Stage 0 numbers the optimizer's parameters; where some are frozen, several assignments may fit.
std::string FileBridge::order_of_parameters() {
  if (config_.model.frozen == 0) return "";
  std::string order[2];
  for (const reference::ParameterInfo& info : reference::parameters_of(config_.model)) {
    if (info.trains) order[config_.split_decay && !info.decays ? 1 : 0] += info.name + "\n";
  }
  const std::string path = "/order";
  checkpoint::replace_small_file(storage_, path,
                                 order[0] + (order[1].empty() ? "" : "\n" + order[1]));
  return path;
}

void FileBridge::bring(const std::string& from, const std::string& to, const Leg& leg) {
  const checkpoint::ReadOptions options{.param_order = order_of_parameters(), .workers = 1};
  checkpoint::ShardedState source = checkpoint::read_checkpoint(storage_, from, options);
  if (leg.topology.tensor > 1 && source.splits.empty()) {
    checkpoint::adopt_splits(&source,
                             checkpoint::read_checkpoint(storage_, donor_of_splits(), options));
  }
  checkpoint::ReshardOptions reshard_options{
      .allow_dropped = {}, .splits = {.kv_heads = config_.model.kv_heads}, .stages = {}};
  if (source.pipeline.present()) {
    const reference::ModelConfig& model = config_.model;
    reshard_options.stages.parts = reference::pipeline_parts(model, leg.topology.pipeline);
    if (model.tied) reshard_options.stages.tied["embed"] = {0, static_cast<int>(model.layers) + 2};
  }
  const checkpoint::TargetFiles target =
      checkpoint::reshard_blueprints(source, leg.topology, leg.stage, reshard_options);
  const std::string folder = to + "/" + source.tag;
  storage_.make_directories(folder);
  const reshard::ReshardPlan plan = reshard::make_plan(source, target.files);
  reshard::execute(storage_, source, plan, folder, {.workers = 1});
  checkpoint::replace_small_file(storage_, to + "/latest", source.tag);
}

std::string FileBridge::no_way(const TrainConfig& config, const Leg& from, const Leg& to) {
  if (is_pipeline_module(config, from) != is_pipeline_module(config, to)) {
    return "a PipelineModule's files name layers, the others' parameters";
  }
  const bool folded = config.model.experts > 0 && to.topology.tensor > 1;
  if (!folded || from.topology == to.topology) return "";
  return "no reshard leads to experts folded with tensor-parallel ranks, but from their own "
         "topology";
}

std::string FileBridge::unsupported(const TrainConfig& config, const Leg& leg) {
  TrainingState state{.dtype = config.model.dtype,
                      .stage = leg.stage,
                      .pipeline_module = is_pipeline_module(config, leg)};
  if (config.model.experts > 0) state.groups.push_back({.expert = true});
  if (const std::string why = reference::sequence_unsupported(config.model, leg.topology);
      !why.empty()) {
    return why;
  }
  return engine::supports(state, leg.topology).why;
}

}  // namespace isoshard::properties
