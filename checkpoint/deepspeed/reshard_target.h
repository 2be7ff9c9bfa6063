// A target topology and stage, worked out for one state: groups, flat order, sizes and layouts. The
// writers of model and optimizer files share it. Link 8 of the tensor's journey.
#pragma once

#include <set>
#include <string>
#include <vector>

#include "checkpoint/deepspeed/fields.h"
#include "checkpoint/sharded_state.h"
#include "checkpoint/torch_builder.h"
#include "core/layout.h"
#include "core/topology.h"
#include "core/zero_rules.h"

namespace isoshard::checkpoint {

// One flat buffer of the target: an optimizer group (stages 1, 2) or a sub-group (stage 3).
struct TargetBuffer {
  int group = -1;
  std::vector<int> parameters;        // in flat order
  std::vector<TensorLayout> layouts;  // of each parameter
  std::vector<int64_t> alignment;     // padding elements behind each (stages 1, 2)
  int64_t total = 0;                  // elements without the padding at the end
  int64_t partition = 0;              // elements of one rank
};

struct ReshardTarget {
  const ShardedState& state;
  Topology topology;
  int stage = 0;
  int ranks = 1;                  // dp·sp
  bool bf16_optimizer = false;    // BF16_Optimizer's form at stage 1
  bool aligned = false;           // zero_optimization.parameter_alignment
  bool writes_alignment = false;  // param_alignment_paddings is written (DeepSpeed ≥ 0.19.8)
  bool frozen_excluded = false;   // the source was saved with exclude_frozen_parameters
  std::string prefix;             // "bf16_" or ""
  std::vector<TargetBuffer> buffers;
  std::set<std::string> synthesised;  // what is written without a source, for the certificate
  std::set<std::string> skipped;      // what the target's stage has no place for, likewise

  const ParameterState& parameter(int number) const {
    return state.parameters[static_cast<size_t>(number)];
  }
  // Rank 0's model file and, where there is one, the file with the optimizer's global state.
  int model_file() const { return state.model_files[0]; }
};

// Throws Error(kUnsupported) for topologies that these files cannot have.
ReshardTarget make_target(const ShardedState& state, const Topology& topology, int stage);

// Copy of a source dictionary whose values may be replaced by key.
class MappingCopy {
 public:
  MappingCopy(TorchBuilder* builder, const ShardedState& state, NodeRef mapping);
  void set(const std::string& key, NodeId value);  // replaces in place, or appends
  void set_if_present(const std::string& key, NodeId value);
  NodeId finish();

 private:
  TorchBuilder& builder_;
  const TorchFile& document_;
  int file_;
  std::vector<std::pair<NodeId, NodeId>> entries_;  // source key, new value
  std::vector<NodeId> values_;                      // source values
  std::vector<std::string> keys_;
  std::vector<std::pair<std::string, NodeId>> appended_;
};

// The source's ds_config with the target's stage and sequence degree.
NodeId target_config(TorchBuilder* builder, const ReshardTarget& target);

// The storage of one leaf kind for one rank of one buffer: its fragments at their local offsets.
StorageFill rank_fill(const TargetBuffer& buffer, int rank, const std::vector<int>& leaves,
                      DType dtype);

// Files of the target tag folder.
FileBlueprint model_blueprint(ReshardTarget* target, int rank);
FileBlueprint optim_blueprint(ReshardTarget* target, int rank);
NodeId stage0_optimizer(ReshardTarget* target, TorchBuilder* builder);
// zero/optimizer_state.pt of a universal folder whose source has no partition files (stage 0).
FileBlueprint global_state_blueprint(ReshardTarget* target);

// All files of a checkpoint of `state` at that topology and stage. `allow_dropped` names what may
// be left behind: "client_state" (that of ranks other than 0).
TargetFiles reshard_blueprints(const ShardedState& state, const Topology& topology, int stage,
                               const std::set<std::string>& allow_dropped);

}  // namespace isoshard::checkpoint
