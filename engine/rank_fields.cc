// See rank_fields.h.
#include "engine/rank_fields.h"

#include <set>

#include "checkpoint/deepspeed/hyper.h"
#include "core/error.h"

namespace isoshard::engine {

using checkpoint::Fields;
using checkpoint::NodeId;

void load_scale(const Fields& fields, NodeId scaler, LossScale* scale) {
  const NodeId state = fields.state_of(scaler);
  const checkpoint::Pickle& pickle = fields.pickle();
  const auto number = [&](const std::string& key, double other) {
    const NodeId node = fields.maybe(state, key);
    if (node == checkpoint::kNoNode) return other;
    if (pickle.kind(node) == checkpoint::Kind::kFloat) return pickle.real_value(node);
    return static_cast<double>(fields.integer(node, key));
  };
  const auto whole = [&](const std::string& key, int64_t other) {
    const NodeId node = fields.maybe(state, key);
    return node == checkpoint::kNoNode ? other : fields.integer(node, key);
  };
  scale->scale = number("cur_scale", scale->scale);
  scale->dynamic = fields.truth(state, "dynamic");
  scale->iteration = whole("cur_iter", 0);
  scale->last_overflow = whole("last_overflow_iter", -1);
  scale->hysteresis_left = whole("cur_hysteresis", scale->hysteresis);
}

int64_t optimizer_steps(RankReader& reader, NodeId states) {
  const std::vector<NodeId>& entries = entries_of(reader.fields(), states, "state");
  if (entries.size() < 2) return 0;
  const NodeId step = reader.fields().maybe(entries[1], "step");
  if (step == checkpoint::kNoNode) return -1;
  const float steps = reader.values(step, 1, "step")[0];
  if (!(steps >= 0 && steps < 1e9f)) {
    reader.fields().fail("The optimizer's count of steps is none.", "step", "a number of steps",
                         std::to_string(steps));
  }
  return static_cast<int64_t>(steps);
}

void load_settings(const Fields& fields, NodeId groups, TrainingState* state) {
  const checkpoint::Pickle& pickle = fields.pickle();
  for (size_t g = 0; g < state->groups.size(); ++g) {
    const NodeId entry = item_of(fields, groups, g, "param_groups");
    for (auto& [key, setting] : state->groups[g].settings) {
      const NodeId found = fields.maybe(entry, key);
      if (found == checkpoint::kNoNode || !std::holds_alternative<double>(setting)) continue;
      if (pickle.kind(found) == checkpoint::Kind::kFloat) setting = pickle.real_value(found);
    }
  }
}

Json client_state(const Fields& fields, const LoadOptions& options) {
  std::set<std::string> left_out = {"module"};
  if (!options.load_module_only) {
    left_out.insert({"skipped_steps", "global_steps", "dp_world_size", "mp_world_size",
                     "data_sampler", "random_ltd"});
  }
  if (options.load_lr_scheduler_states) left_out.insert("lr_scheduler");
  if (options.load_optimizer_states) left_out.insert("optimizer");
  Json state = Json::object();
  int64_t left = 100'000;
  const std::vector<NodeId>& entries = entries_of(fields, fields.root(), "the model file");
  for (size_t i = 0; i + 1 < entries.size(); i += 2) {
    const std::string key = fields.text(entries[i], "a key of the model file");
    const bool left_behind =
        options.clean_client_state ? checkpoint::is_engine_key(key) : left_out.count(key) != 0;
    if (!left_behind) {
      state[key] = json_of(fields.pickle(), entries[i + 1], 0, &left);
    }
  }
  return state;
}

void load_counters(const RankReader& reader, const LoadOptions& options, TrainingState* state) {
  const Fields& fields = reader.fields();
  TrainingCounters& counters = state->counters;
  counters.steps = reader.integer(fields.root(), "global_steps");
  counters.skipped_steps = reader.integer(fields.root(), "skipped_steps");
  if (counters.skipped_steps < 0 || counters.steps < counters.skipped_steps ||
      counters.steps > int64_t{1} << 53) {
    fields.fail("The counts of steps contradict each other.", "global_steps, skipped_steps",
                "0 ≤ skipped_steps ≤ global_steps",
                std::to_string(counters.skipped_steps) + " and " + std::to_string(counters.steps));
  }
  const NodeId samples = reader.need(fields.root(), "global_samples");
  const checkpoint::Pickle& pickle = fields.pickle();
  if (pickle.kind(samples) == checkpoint::Kind::kFloat) {  // of Ulysses
    const double number = pickle.real_value(samples);
    if (!(number >= 0 && number < 0x1p53)) {
      fields.fail("global_samples is no number of samples.", "global_samples", "0 or more",
                  std::to_string(number));
    }
    counters.samples = static_cast<int64_t>(number);
  } else {
    counters.samples = fields.integer(samples, "global_samples");
  }
  if (!options.load_lr_scheduler_states) return;
  counters.schedule_iteration = counters.steps - counters.skipped_steps - 1;
  const NodeId scheduler = fields.maybe(fields.root(), "lr_scheduler");
  if (scheduler != checkpoint::kNoNode) {
    counters.schedule_iteration = reader.integer(scheduler, "last_batch_iteration");
  }
}

}  // namespace isoshard::engine
