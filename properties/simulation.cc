// See simulation.h.
#include "properties/simulation.h"

#include <bit>

#include "checkpoint/cancel.h"
#include "checkpoint/deepspeed/reader.h"
#include "checkpoint/deepspeed/reshard_target.h"
#include "core/hex_float.h"
#include "core/random.h"
#include "reshard/executor.h"

namespace isoshard::properties {
namespace {

using engine::CheckpointEngine;
using engine::Json;
using reference::StepReport;
using reference::TrainConfig;
using reference::Trainer;

constexpr const char* kFixed = "isoshard_fixed_exponents";

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

}  // namespace

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
  json["optimizer"] = {{"type", reference::name(o.kind)}, {"params", params}};
  if (config.model.dtype == DType::kBFloat16) json["bf16"] = {{"enabled", true}};
  if (config.model.dtype == DType::kFloat16) json["fp16"] = {{"enabled", true}};
  if (topology.tensor > 1) json["tensor_parallel"] = {{"autotp_size", topology.tensor}};
  if (topology.sequence > 1) json["sequence_parallel_size"] = topology.sequence;
  return json;
}

Simulation::Simulation(const TrainConfig& config, uint64_t seed, Hooks hooks)
    : config_(config), seed_(seed), hooks_(std::move(hooks)) {}

Simulation::~Simulation() = default;

// A run of one tensor-parallel rank does not record how its tensors are cut: one of two does.
std::string Simulation::donor_of_splits() {
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

// Reshards the saved files to a leg's topology and stage.
void Simulation::bring_files(const Leg& leg) {
  const checkpoint::ReadOptions options{.workers = 1};
  checkpoint::ShardedState source = checkpoint::read_checkpoint(storage_, saved_, options);
  if (leg.topology.tensor > 1 && source.splits.empty()) {
    checkpoint::adopt_splits(&source,
                             checkpoint::read_checkpoint(storage_, donor_of_splits(), options));
  }
  const checkpoint::ReshardOptions reshard_options{
      .allow_dropped = {}, .splits = {.kv_heads = config_.model.kv_heads}, .stages = {}};
  const checkpoint::TargetFiles target =
      checkpoint::reshard_blueprints(source, leg.topology, leg.stage, reshard_options);
  const std::string folder = "/leg" + std::to_string(legs_) + "/" + source.tag;
  storage_.make_directories(folder);
  const reshard::ReshardPlan plan = reshard::make_plan(source, target.files);
  reshard::execute(storage_, source, plan, folder, {.workers = 1});
  saved_ = "/leg" + std::to_string(legs_);
  const std::unique_ptr<WritableFile> latest = storage_.create(saved_ + "/latest");
  latest->write_at(0, std::as_bytes(std::span(source.tag)));
  latest->close();
}

// Why the engine writes no files for a leg of this run; empty: it does.
std::string Simulation::files_unsupported(const Leg& leg) const {
  TrainingState state{.dtype = config_.model.dtype, .stage = leg.stage};
  if (config_.model.experts > 0) state.groups.push_back({.expert = true});
  return engine::files_unsupported(state, leg.topology);
}

void Simulation::run(const Leg& leg) {
  TrainConfig config = config_;
  config.stage = leg.stage;
  const bool resumes = legs_ > 0;
  bool by_files = resumes && !saved_.empty();
  ++legs_;
  sim::Cluster cluster(leg.topology, {.seed = keyed_random(seed_, {static_cast<uint64_t>(legs_)})});
  std::vector<std::unique_ptr<Trainer>> trainers(static_cast<size_t>(leg.topology.world()));
  const std::string reason = files_unsupported(leg);
  if (!reason.empty()) by_files = false;
  if (by_files) {
    const bool same = last_.topology == leg.topology && last_.stage == leg.stage;
    if (!same) bring_files(leg);
    ++record_.files_legs;
  }
  const reference::WholeState before = std::move(record_.state);
  const std::string save_dir = "/saved" + std::to_string(legs_);
  reference::LayoutCache layouts;
  cluster.run([&](sim::Rank& rank) {
    const ParallelState parallel = parallel_state(rank);
    auto& trainer = trainers[static_cast<size_t>(rank.number())];
    trainer = std::make_unique<Trainer>(config, parallel, &layouts);
    CheckpointEngine files(storage_, parallel, deepspeed_config(config, leg.topology, leg.stage),
                           [](const std::string&) {});
    if (by_files) {
      const Json client =
          files.load_checkpoint(&trainer->state(), saved_, {.clean_client_state = true})
              .client_state;
      take_client_state(client, &trainer->state());
      trainer->refresh_parameters();
    } else if (resumes) {
      trainer->adopt(before, counted_);
    } else {
      trainer->initialise();
    }
    if (resumes && hooks_.after_load) hooks_.after_load(trainer.get(), rank.number());
    for (int step = 0; step < leg.steps; ++step) {
      checkpoint::throw_if_cancelled();
      const StepReport report = trainer->step();
      if (hooks_.after_step) hooks_.after_step(trainer.get(), rank.number());
      if (rank.number() == 0) record_.steps.push_back(report);
    }
    if (reason.empty()) {
      files.save_checkpoint(trainer->state(), save_dir,
                            {.client_state = client_state(trainer->state())});
    }
  });
  saved_ = reason.empty() ? save_dir : "";
  last_ = leg;
  std::vector<const TrainingState*> states;
  for (const auto& trainer : trainers) states.push_back(&trainer->state());
  record_.state = reference::whole_state(states);
  counted_.counters = trainers[0]->state().counters;
  counted_.fixed_largest = trainers[0]->state().fixed_largest;
  counted_.loss_scale = trainers[0]->state().loss_scale;
  record_.trace_hash = mix(record_.trace_hash ^ cluster.trace().hash());
  record_.events += static_cast<int64_t>(cluster.trace().events().size());
}

Record single_rank(const TrainConfig& config, int steps) {
  Record record;
  TrainConfig alone = config;
  alone.stage = 0;
  sim::Cluster cluster({});
  cluster.run([&](sim::Rank& rank) {
    Trainer trainer(alone, parallel_state(rank));
    trainer.initialise();
    for (int step = 0; step < steps; ++step) {
      checkpoint::throw_if_cancelled();
      record.steps.push_back(trainer.step());
    }
    record.state = reference::whole_state({&trainer.state()});
  });
  return record;
}

std::string difference(const Record& expected, const Record& found) {
  const size_t steps = std::min(expected.steps.size(), found.steps.size());
  for (size_t i = 0; i < steps; ++i) {
    const StepReport &a = expected.steps[i], &b = found.steps[i];
    const std::string at = "step " + std::to_string(i + 1) + ": ";
    if (std::bit_cast<uint32_t>(a.loss) != std::bit_cast<uint32_t>(b.loss)) {
      return at + "loss " + hex_float(b.loss) + ", on one rank " + hex_float(a.loss);
    }
    if (a.tokens != b.tokens) return at + "another number of tokens with a loss";
    if (std::bit_cast<uint64_t>(a.norm) != std::bit_cast<uint64_t>(b.norm)) {
      return at + "norm " + hex_float(b.norm) + ", on one rank " + hex_float(a.norm);
    }
    if (a.skipped != b.skipped) return at + "skipped on one side only";
  }
  if (expected.steps.size() != found.steps.size()) return "another number of steps";
  return reference::difference(expected.state, found.state);
}

}  // namespace isoshard::properties
