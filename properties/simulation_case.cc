// See simulation_case.h.
#include "properties/simulation_case.h"

#include <algorithm>
#include <new>
#include <set>

#include "checkpoint/cancel.h"
#include "core/error.h"
#include "core/random.h"

namespace isoshard::properties {
namespace {

using reference::ModelConfig;
using reference::OptimizerKind;
using reference::ScheduleKind;
using reference::TrainConfig;

ModelConfig draw_model(const Draw& draw) {
  ModelConfig m;
  m.seed = static_cast<uint64_t>(draw(1, 1'000'000));
  m.dtype = std::vector<DType>{DType::kFloat32, DType::kBFloat16,
                               DType::kFloat16}[static_cast<size_t>(draw(0, 2))];
  m.vocabulary = draw(5, 17);
  m.hidden = draw(1, 12);
  m.kv_heads = draw(1, 4);
  m.heads = m.kv_heads * draw(1, 3);
  m.head_size = 2 * draw(1, 2);
  m.intermediate = draw(1, 13);
  m.layers = draw(1, 3);
  m.tied = draw(0, 3) == 1;
  m.causal = draw(0, 3) != 1;
  if (draw(0, 2) == 1) {
    m.experts = std::vector<int64_t>{2, 3, 4, 6, 8}[static_cast<size_t>(draw(0, 4))];
    m.top_k = draw(1, std::min<int64_t>(3, m.experts));
    m.expert_intermediate = draw(1, 7);
    m.shared_expert = draw(0, 1) == 1;
  }
  m.dropout = draw(0, 3) == 1 ? 0.25 : 0.0;
  return m;
}

const char* const kStates[] = {"exp_avg",         "exp_avg_sq", "momentum_buffer", "max_exp_avg_sq",
                               "square_averages", "z",          "exp_avg_sq_row"};

// One time in three the optimizer is a script's own, with a state drawn at random.
void draw_custom_optimizer(const Draw& draw, reference::OptimizerConfig* optimizer) {
  if (draw(0, 2) != 2) return;
  optimizer->kind = OptimizerKind::kCustom;
  optimizer->counts = draw(0, 1) == 1;
  for (const std::string& name : draw_state_names(draw)) {
    const float decay = static_cast<float>(draw(0, 15)) / 16.0f;
    optimizer->states.push_back({name, decay, draw(0, 1) == 1});
  }
}

}  // namespace

std::vector<std::string> draw_state_names(const Draw& draw) {
  std::vector<std::string> names;
  const int64_t count = draw(1, 4);
  for (int64_t k = 0; k < count; ++k) {
    const std::string name = kStates[draw(0, std::size(kStates) - 1)];
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
  }
  return names;
}

bool fits(const ModelConfig& model, const Topology& topology) {
  try {
    reference::check_model(model, topology);
    return true;
  } catch (const Error&) {
    return false;
  }
}

int SimulationCase::steps() const {
  int total = 0;
  for (const Leg& leg : legs) total += leg.steps;
  return total;
}

TrainConfig draw_config(const Draw& draw) {
  TrainConfig c;
  c.model = draw_model(draw);
  c.data.seed = static_cast<uint64_t>(draw(1, 1'000'000));
  c.data.sequence_length = draw(2, 9);
  c.data.batch = draw(1, 5);
  c.data.micro_batch = draw(1, 3);
  c.data.strided = draw(0, 1) == 1;
  c.data.packed = draw(0, 2) == 1;
  c.data.masked = static_cast<int>(draw(0, 4));
  c.optimizer.kind = static_cast<OptimizerKind>(draw(0, 2));
  c.optimizer.weight_decay = draw(0, 2) == 1 ? 0.0 : 0.01;
  c.schedule.kind = static_cast<ScheduleKind>(draw(0, 3));
  c.schedule.max_lr = draw(0, 1) == 1 ? 0.03 : 0.004;
  c.clip = draw(0, 2) == 1 ? 0.3 : 0.0;
  c.split_decay = draw(0, 2) == 1;
  c.reduce = draw(0, 2) == 1 ? reference::ReduceMode::kFixed : reference::ReduceMode::kTree;
  if (c.model.dtype == DType::kFloat16) {
    c.loss_scale = {.dynamic = true, .scale = draw(0, 1) == 1 ? 8388608.0 : 1024.0, .window = 3};
  }
  c.pipeline_module = draw(0, 3) == 1 && c.model.experts == 0;
  draw_custom_optimizer(draw, &c.optimizer);
  if (const int64_t frozen = draw(0, 7); frozen > 4 && c.model.experts == 0) {
    c.model.frozen = frozen - 3;  // every second to fourth
  }
  return c;
}

void show_gradients(TrainConfig* config) {
  config->model.dtype = DType::kFloat32;
  config->loss_scale = {};
  config->clip = 0;
  config->optimizer.kind = OptimizerKind::kSgd;
  config->optimizer.weight_decay = 0;
}

std::vector<Topology> fitting(const std::vector<Topology>& topologies, TrainConfig* config) {
  std::vector<Topology> possible;
  for (const Topology& topology : topologies) {
    if (fits(config->model, topology)) possible.push_back(topology);
  }
  // A model that fits none gives way: it gets what the topologies ask for.
  if (possible.empty()) {
    const Topology& first = topologies.at(0);
    if (first.expert > 1) {
      config->model.frozen = 0;
      config->model.experts = 8 % first.expert == 0 ? 8 : first.expert;
      config->model.top_k = std::min<int64_t>(2, config->model.experts);
      config->pipeline_module = false;
    }
    config->model.layers = std::max(3, first.pipeline);
    for (const Topology& topology : topologies) {
      if (fits(config->model, topology)) possible.push_back(topology);
    }
  }
  if (possible.empty()) {
    throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                          .what = "No model that is drawn can have such a topology.",
                          .entry = to_string(topologies.at(0)),
                          .next = "name another topology"});
  }
  return possible;
}

SimulationCase draw_case(const Draw& draw, const CaseLimits& limits) {
  SimulationCase value{.config = draw_config(draw)};
  value.seed = static_cast<uint64_t>(draw(1, 1'000'000));
  const std::vector<Topology> possible = fitting(limits.topologies, &value.config);
  for (int done = 0; done < limits.steps; done += limits.every) {
    const int64_t pick = draw(0, static_cast<int64_t>(possible.size()) - 1);
    value.legs.push_back({possible[static_cast<size_t>(pick)], static_cast<int>(draw(0, 3)),
                          std::min(limits.every, limits.steps - done)});
  }
  return value;
}

SimulationCase seeded_case(uint64_t seed, uint64_t number, const CaseLimits& limits) {
  Random random(keyed_random(seed, {number}));
  return draw_case([&](int64_t low, int64_t high) { return random.between(low, high); }, limits);
}

std::string text_of(const TrainConfig& config) {
  const ModelConfig& m = config.model;
  const reference::DataConfig& d = config.data;
  const auto text = [](int64_t number) { return std::to_string(number); };
  std::string out = "model   " + std::string(name(m.dtype)) + ", vocabulary " + text(m.vocabulary) +
                    ", hidden " + text(m.hidden) + ", heads " + text(m.heads) + "/" +
                    text(m.kv_heads) + " of " + text(m.head_size) + ", MLP " +
                    text(m.intermediate) + ", layers " + text(m.layers);
  if (m.tied) out += ", tied";
  if (m.frozen > 0) out += ", every " + text(m.frozen) + ". matrix frozen";
  if (!m.causal) out += ", not causal";
  if (m.experts > 0) {
    out += ", experts " + text(m.experts) + " top " + text(m.top_k) + " of " +
           text(m.expert_intermediate) + (m.shared_expert ? " and a shared one" : "");
  }
  if (m.dropout > 0) out += ", dropout";
  out += "\ndata    length " + text(d.sequence_length) + ", batch " + text(d.batch) + ", micro " +
         text(d.micro_batch) + (d.strided ? ", strided" : "") + (d.packed ? ", packed" : "") +
         (d.masked > 0 ? ", masked 1 in " + text(d.masked) : "");
  std::string kept;  // by a custom optimizer
  for (const reference::CustomState& state : config.optimizer.states) kept += " " + state.name;
  out += "\ntrain   " + std::string(reference::name(config.optimizer.kind)) + kept +
         (config.clip > 0 ? ", clipped" : "") + (config.split_decay ? ", norms apart" : "") +
         (config.pipeline_module ? ", a PipelineModule" : "") +
         (config.reduce == reference::ReduceMode::kFixed ? ", sums in fixed point" : "");
  return out;
}

std::string text_of_memory(const TrainConfig& config, const std::vector<Leg>& legs) {
  std::string out;
  std::set<std::string> told;
  for (size_t i = 0; i < legs.size(); ++i) {
    std::string what = to_string(legs[i]), why = FileBridge::unsupported(config, legs[i]);
    if (why.empty() && i > 0 && FileBridge::unsupported(config, legs[i - 1]).empty()) {
      what = to_string(legs[i - 1]) + " to " + what;
      why = FileBridge::no_way(config, legs[i - 1], legs[i]);
    }
    if (!why.empty() && told.insert(what).second) out += "\nin memory alone: " + what + ": " + why;
  }
  return out;
}

std::string text_of(const SimulationCase& value) {
  std::string out = text_of(value.config) + "\nlegs   ";
  for (const Leg& leg : value.legs) {
    out += " " + to_string(leg) + " ×" + std::to_string(leg.steps) + ";";
  }
  return out + text_of_memory(value.config, value.legs);
}

CaseResult run_case(const SimulationCase& value, const OnTrace& on_trace) {
  CaseResult result;
  Simulation simulation(value.config, value.seed, {.on_trace = on_trace});
  try {
    for (const Leg& leg : value.legs) {
      simulation.run(leg);
      if (&leg != &value.legs.front() &&
          !((&leg)[-1].topology == leg.topology && (&leg)[-1].stage == leg.stage)) {
        ++result.changes;
      }
    }
    result.reason = difference(single_rank(value.config, value.steps()), simulation.record());
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const std::exception& failure) {
    checkpoint::throw_if_cancelled();  // then it was no failure
    result.reason = failure.what();
  }
  result.trace_hash = simulation.record().trace_hash;
  result.events = simulation.record().events;
  result.files_changes = simulation.record().files_legs;
  return result;
}

}  // namespace isoshard::properties
