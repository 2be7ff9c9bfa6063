// The model-state file: names, shapes, buffers, ties, counters (deepspeed/runtime/engine.py,
// _save_checkpoint). Everything a reader of any stage needs from it.
#pragma once

#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/deepspeed/fields.h"
#include "checkpoint/sharded_state.h"

namespace isoshard::checkpoint {

using NamedShapes = std::vector<std::pair<std::string, Shape>>;

struct ModelStates {
  int file = -1;
  std::vector<std::pair<std::string, NodeId>> module;
  std::set<std::string> buffer_names;
  std::vector<NamedShapes> param_shapes;  // by group, or by sub-group at stage 3
  bool has_param_shapes = false;          // false at stage 0
  NamedShapes frozen_shapes;
  bool has_frozen_shapes = false;
  NodeId frozen_fragments = kNoNode;
  std::map<std::string, std::string> shared;  // alias → first name
  std::set<std::string> unrecorded;           // those of `shared` that shared_params does not list
  std::vector<std::string> shared_order;
  int64_t dp_world = 0;
  int64_t mp_world = 1;
  int64_t tp_degree = 1;
  int64_t pp_degree = 1;
  bool has_degrees = false;  // checkpoint_parallel_dimensions is there
  int64_t global_steps = 0;
  bool samples_are_float = false;  // global_samples is a float when sp > 1
  std::string version;
  NodeId config = kNoNode;  // ds_config
};

// Reads file number `file` of the state; refuses by name what is not supported yet.
ModelStates read_model_states(const ShardedState& state, int file);

// Adds buffers, aliases, frozen parameters and model copies to the state. The trainable parameters
// must be there. `frozen` says how a frozen parameter's elements lie.
void add_module_entries(ShardedState* state, const ModelStates& model);

// Degrees of all axes, and from which evidence; `mp_ranks` is the number of model shards,
// `sequence_asked` is --sp, 0 if not given.
void set_topology(ShardedState* state, const ModelStates& model, int mp_ranks, int sequence_asked);

// An integer of ds_config's zero_optimization section, or `otherwise`.
int64_t zero_option(const Fields& fields, NodeId config, const std::string& key, int64_t otherwise);

}  // namespace isoshard::checkpoint
