// See layout_case.h.
#include "properties/layout_case.h"

#include <algorithm>
#include <bit>
#include <map>

#include "checkpoint/small_file.h"
#include "core/cast.h"
#include "core/error.h"
#include "core/hex_float.h"
#include "core/random.h"

namespace isoshard::properties {
namespace {

using engine::CheckpointEngine;
using reference::TrainConfig;
using reference::Trainer;

uint64_t key_of(uint64_t seed, const std::string& text) {
  uint64_t word = mix(seed ^ text.size());
  for (const char c : text) word = mix(word ^ static_cast<unsigned char>(c));
  return word;
}

// 23 bits and a sign, −0 among them.
float value_of(uint64_t key, int64_t element) {
  const uint64_t word = keyed_random(key, {static_cast<uint64_t>(element)});
  if (word % 64 == 0) return -0.0f;
  return static_cast<float>(static_cast<int64_t>(word >> 40) - (1 << 23)) * 0x1p-20f;
}

constexpr const char* kFrozen = " param";  // behind a name: the values of a frozen parameter

// Calls `visit(what, key, element, value)` for every element of the masters, states and frozen
// parameters that a rank holds.
template <typename Visit>
void visit_values(TrainingState* state, uint64_t seed, bool with_states, const Visit& visit) {
  for (TrainedParameter& p : state->parameters) {
    if (!p.frozen()) continue;
    const std::string what = p.name + kFrozen;
    for (size_t i = 0; i < p.values.size(); ++i) {
      const int64_t at = p.values_begin + static_cast<int64_t>(i);
      visit(what, key_of(seed, what), reference::whole_element(p, at), &p.values[i]);
    }
  }
  for (TrainedGroup& group : state->groups) {
    const auto all = [&](const std::string& name, std::vector<float>* values) {
      for (const BufferPiece& piece : group.pieces) {
        const TrainedParameter& p = state->parameters[static_cast<size_t>(piece.parameter)];
        const uint64_t key = key_of(seed, p.name + "/" + name);
        for (int64_t i = 0; i < piece.count; ++i) {
          visit(p.name + " " + name, key, reference::whole_element(p, piece.begin + i),
                &(*values)[static_cast<size_t>(piece.at + i)]);
        }
      }
    };
    all("fp32", &group.master);
    if (!with_states) continue;
    for (auto& [name, values] : group.states) all(name, &values);
  }
}

// Where the files hold a number of its own, it is one of its own.
TrainingCounters counters_of(const LayoutCase& value) {
  const auto number = [&](uint64_t which) {
    return static_cast<int64_t>(1 + keyed_random(value.seed, {which}) % 1000);
  };
  const int64_t good = number(1), bad = number(2);
  const bool counted = reference::counts_steps(value.config.optimizer);
  const bool scheduled = value.config.schedule.kind != reference::ScheduleKind::kConstant;
  return {.steps = good + bad,
          .skipped_steps = bad,
          .optimizer_steps = counted ? number(4) : good,
          .samples = number(3),
          .schedule_iteration = scheduled ? number(5) : good - 1};
}

void apply(LayoutMutant mutant, Storage& storage, const std::string& folder, int64_t layers) {
  if (mutant == LayoutMutant::kNone) return;
  const auto read = [&](const std::string& path) {
    return read_small_file(storage, path, int64_t{1} << 30);
  };
  if (mutant == LayoutMutant::kSwappedLayers) {
    const std::string one = folder + "/layer_01-model_states.pt";
    const std::string two = folder + "/layer_02-model_states.pt";
    if (layers < 2 || !storage.is_file(one)) return;  // otherwise the second is the norm
    const std::string first = read(one), second = read(two);
    checkpoint::replace_small_file(storage, one, second);
    checkpoint::replace_small_file(storage, two, first);
    return;
  }
  std::vector<std::string> files;
  for (const DirectoryEntry& entry : storage.list(folder)) {
    if (entry.name.ends_with("_optim_states.pt")) files.push_back(folder + "/" + entry.name);
  }
  if (files.size() < 2) return;
  const std::string first = read(files.front()), last = read(files.back());
  checkpoint::replace_small_file(storage, files.back(), first);
  if (mutant == LayoutMutant::kSwappedRanks) {
    checkpoint::replace_small_file(storage, files.front(), last);
  }
}

TrainConfig config_of(const LayoutCase& value, const Leg& leg) {
  TrainConfig config = value.config;
  config.stage = leg.stage;
  return config;
}

// A rank's trainer with the case's states, all of them zero.
std::unique_ptr<Trainer> make_trainer(const LayoutCase& value, const Leg& leg,
                                      const ParallelState& parallel,
                                      reference::LayoutCache* cache) {
  auto trainer = std::make_unique<Trainer>(config_of(value, leg), parallel, cache);
  for (TrainedGroup& group : trainer->state().groups) {
    group.states.clear();
    for (const std::string& name : value.states) {
      group.states.emplace_back(name, std::vector<float>(group.master.size(), 0.0f));
    }
  }
  return trainer;
}

CheckpointEngine engine_of(Storage& storage, const LayoutCase& value, const Leg& leg,
                           const ParallelState& parallel) {
  return CheckpointEngine(storage, parallel,
                          deepspeed_config(config_of(value, leg), leg.topology, leg.stage),
                          [](const std::string&) {});
}

// Of a load of all, or of the weights alone: the masters, rounded.
std::string element_difference(const LayoutCase& value, int rank, bool weights_alone,
                               TrainingState* state) {
  std::string reason;
  const std::string where =
      "rank " + std::to_string(rank) + (weights_alone ? ", weights alone" : "");
  visit_values(state, value.seed, !weights_alone,
               [&](const std::string& what, uint64_t key, int64_t element, float* found) {
                 float expected = value_of(key, element);
                 if (weights_alone || what.ends_with(kFrozen))
                   expected = rounded_to(state->dtype, expected);
                 if (std::bit_cast<uint32_t>(expected) == std::bit_cast<uint32_t>(*found)) return;
                 if (!reason.empty()) return;
                 reason = where + ", " + what + "[" + std::to_string(element) +
                          "]: " + hex_float(*found) + ", saved as " + hex_float(expected);
               });
  if (reason.empty() && !weights_alone && !(state->counters == counters_of(value))) {
    reason = where + ": other counters";
  }
  return reason;
}

// Heads that DeepSpeed's Ulysses shares among so many ranks, in one of its two ways.
void give_heads(const Draw& draw, int ranks, reference::ModelConfig* model) {
  const bool uneven = draw(0, 1) == 1;
  std::vector<int64_t> divisors;
  for (int64_t d = 1; d <= ranks; ++d) {
    if (ranks % d == 0) divisors.push_back(d);
  }
  const int64_t last = static_cast<int64_t>(divisors.size()) - 1;
  model->kv_heads = uneven ? ranks + draw(0, 2) : divisors[static_cast<size_t>(draw(0, last))];
  model->heads = uneven ? model->kv_heads * draw(1, 2) : ranks * draw(1, 2);
  model->head_size = 2;
}

}  // namespace

std::string name(LayoutMutant mutant) {
  constexpr const char* kNames[] = {"None", "SwappedRanks", "StaleFile", "SwappedLayers"};
  return kNames[static_cast<size_t>(mutant)];
}

std::vector<int> stages_with_files(const TrainConfig& config, const Topology& topology) {
  std::vector<int> stages;
  for (int stage = 0; stage <= 3; ++stage) {
    if (FileBridge::unsupported(config, {topology, stage, 0}).empty()) stages.push_back(stage);
  }
  return stages;
}

LayoutCase draw_layout_case(const Draw& draw, const std::vector<Topology>& from,
                            const std::vector<Topology>& to) {
  LayoutCase value{.config = draw_config(draw)};
  value.seed = static_cast<uint64_t>(draw(1, 1'000'000));
  value.states = draw_state_names(draw);
  const auto one_of = [&](const auto& list) {
    return list[static_cast<size_t>(draw(0, static_cast<int64_t>(list.size()) - 1))];
  };
  const auto pick = [&](const std::vector<Topology>& topologies, const Leg* before) -> Leg {
    std::map<int, std::vector<Topology>> by_size;  // by the power of two below the number of ranks
    for (const Topology& topology : topologies) {
      by_size[std::bit_width(static_cast<unsigned>(topology.world()))].push_back(topology);
    }
    auto size = by_size.begin();
    std::advance(size, draw(0, static_cast<int64_t>(by_size.size()) - 1));
    std::vector<Leg> legs;
    for (const Topology& topology : size->second) {
      if (!fits(value.config.model, topology)) continue;
      for (const int stage : stages_with_files(value.config, topology)) {
        const Leg leg{topology, stage, 0};
        if (before == nullptr || FileBridge::no_way(value.config, *before, leg).empty())
          legs.push_back(leg);
      }
    }
    if (!legs.empty()) return one_of(legs);
    return {{.data = size->second.front().world()}, 1, 0};
  };
  if (from.size() == 1) fitting(from, &value.config);  // the model gives way
  // To many sequence-parallel ranks too: what is drawn otherwise has up to 4 key-value heads.
  const int sequence = from.size() == 1 ? from[0].sequence : static_cast<int>(draw(0, 8));
  if (sequence > 1 && (from.size() == 1 || sequence > 4)) {
    give_heads(draw, sequence, &value.config.model);
  }
  value.from = pick(from, nullptr);
  // What follows a pipeline is a PipelineModule too, and nothing else can come to one.
  if (value.from.topology.pipeline > 1) value.config.pipeline_module = true;
  value.to = pick(to, &value.from);
  return value;
}

LayoutCase seeded_layout_case(uint64_t seed, uint64_t number,
                              const std::vector<Topology>& topologies) {
  Random random(keyed_random(seed, {number}));
  return draw_layout_case([&](int64_t low, int64_t high) { return random.between(low, high); },
                          topologies, topologies);
}

std::string text_of(const LayoutCase& value) {
  std::string out = text_of(value.config) + "\nstates ";
  for (const std::string& name : value.states) out += " " + name;
  return out + "\nlegs    " + to_string(value.from) + "; " + to_string(value.to);
}

std::string layout_difference(const LayoutCase& value, LayoutMutant mutant) {
  checkpoint::MemoryStorage storage;
  const TrainingCounters counters = counters_of(value);
  sim::Cluster before(value.from.topology, {.seed = value.seed});
  reference::LayoutCache layouts;
  before.run([&](sim::Rank& rank) {
    const ParallelState parallel = parallel_state(rank);
    const auto trainer = make_trainer(value, value.from, parallel, &layouts);
    visit_values(&trainer->state(), value.seed, true,
                 [&](const std::string& what, uint64_t key, int64_t element, float* target) {
                   *target = value_of(key, element);
                   if (what.ends_with(kFrozen))
                     *target = rounded_to(trainer->state().dtype, *target);
                 });
    trainer->state().counters = counters;
    trainer->refresh_parameters();
    engine_of(storage, value, value.from, parallel).save_checkpoint(trainer->state(), "/from", {});
  });
  std::string folder = "/from";
  if (!(value.from.topology == value.to.topology && value.from.stage == value.to.stage)) {
    folder = "/to";
    FileBridge(storage, value.config, value.seed).bring("/from", folder, value.to);
  }
  apply(mutant, storage, folder + "/global_step" + std::to_string(counters.steps),
        value.config.model.layers);
  sim::Cluster after(value.to.topology, {.seed = value.seed});
  std::string reason;
  layouts.clear();
  after.run([&](sim::Rank& rank) {
    const ParallelState parallel = parallel_state(rank);
    CheckpointEngine files = engine_of(storage, value, value.to, parallel);
    for (const bool weights_alone : {false, true}) {
      const auto trainer = make_trainer(value, value.to, parallel, &layouts);
      files.load_checkpoint(&trainer->state(), folder, {.load_module_only = weights_alone});
      const std::string found =
          element_difference(value, rank.number(), weights_alone, &trainer->state());
      if (reason.empty()) reason = found;
    }
  });
  return reason;
}

}  // namespace isoshard::properties
