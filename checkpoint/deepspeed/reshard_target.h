// A target topology and stage, worked out for one state: groups, flat order, sizes and layouts. The
// writers of model and optimizer files share it. Link 8 of the tensor's journey.
#pragma once

#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "checkpoint/deepspeed/fields.h"
#include "checkpoint/deepspeed/stage_plan.h"
#include "checkpoint/deepspeed/tensor_target.h"
#include "checkpoint/sharded_state.h"
#include "checkpoint/torch_builder.h"
#include "core/layout.h"
#include "core/topology.h"
#include "core/zero_rules.h"

namespace isoshard::checkpoint {

class ExpertInfo;

// One flat buffer of the target: an optimizer group (stages 1, 2) or a sub-group (stage 3) of one
// mp rank, or of one expert-parallel rank where it holds experts.
struct TargetBuffer {
  int group = -1;
  bool experts = false;
  int shard = 0;                      // the mp rank, or the expert-parallel rank
  int ranks = 1;                      // that share it: size of its partition group
  std::vector<int> parameters;        // in flat order
  std::vector<TensorLayout> layouts;  // of each parameter's shard
  std::vector<int64_t> alignment;     // padding elements behind each (stages 1, 2)
  int64_t total = 0;                  // elements without the padding at the end
  int64_t partition = 0;              // elements of one rank
};

struct ReshardTarget {
  const ShardedState& state;
  Topology topology;
  int stage = 0;
  int ranks = 1;                  // dp·sp
  bool bf16_optimizer = false;    // BF16_Optimizer's form, at stage 1, or 0 of a pipeline
  bool aligned = false;           // zero_optimization.parameter_alignment
  bool writes_alignment = false;  // param_alignment_paddings is written (DeepSpeed ≥ 0.19.8)
  bool frozen_excluded = false;   // the source was saved with exclude_frozen_parameters
  std::string prefix;             // "bf16_" or ""
  // By mp rank (tensor-parallel rank or pipeline stage), then in the order of the optimizer's
  // groups; and the groups of experts by expert-parallel rank.
  std::vector<std::vector<TargetBuffer>> buffers;
  std::vector<std::vector<TargetBuffer>> expert_buffers;
  std::vector<std::vector<int>> expert_partitions;  // their partition groups: ranks among `ranks`
  std::vector<bool> expert_groups;                  // by group of the optimizer
  std::vector<AffineMap> maps;                // by parameter; none, or empty, where nothing is cut
  std::shared_ptr<const ExpertInfo> experts;  // of the source; none: it has no experts
  StagePlan stages;                           // of a pipeline; empty for other models
  bool beyond_deepspeed = false;              // experts that the ranks do not divide are allowed
  std::map<std::string, int64_t> local_experts;  // native MoE: of one rank, by layer
  std::map<std::string, int> creation_numbers;   // stage 3: by parameter, for ds_id
  std::vector<std::string> inferred;             // for the certificate
  std::set<std::string> synthesised;             // what is written without a source, likewise
  std::set<std::string> skipped;  // what the target's stage has no place for, likewise
  std::set<std::string> beyond;   // what DeepSpeed will refuse, likewise

  const ParameterState& parameter(int number) const {
    return state.parameters[static_cast<size_t>(number)];
  }
  // The shape that an mp rank, or an expert-parallel rank, has of a parameter.
  Shape shard_shape(int number, int shard) const;
  // Adds to `fill`, from element `at` on, elements [begin, begin + count) of that rank's shard of a
  // leaf of the parameter; padding rows of a vocabulary stay zero, or, where the ranks hold what
  // they held, keep their values.
  void add_runs(StorageFill* fill, int number, int shard, const LeafRun& shard_run) const;
  // The leaf of the copy in the model's dtype, or else of the master, which is cast.
  int model_leaf(const ParameterState& parameter);
  bool is_expert(int number) const {
    const int group = parameter(number).group;
    return group >= 0 && !expert_groups.empty() && expert_groups[static_cast<size_t>(group)];
  }
  // AutoEP: every rank holds some of each stack; native MoE: an expert lies on one.
  bool holds_expert(int expert_rank, int number) const;
  // The name that a rank's files give a parameter: native MoE numbers experts by rank.
  std::string name_of(int number, const TargetBuffer& buffer) const;
  // Whether optimizer files hold partitions: BF16_Optimizer has them at stage 0 too, of a pipeline.
  bool partitioned() const { return stage > 0 || bf16_optimizer; }
  // AutoEP folded with AutoTP: experts are shared by all ranks, not by those of one tensor shard.
  bool folded() const { return experts != nullptr && topology.tensor > 1; }
  int expert_world() const { return folded() ? ranks * topology.tensor : ranks; }
  // Its pipeline stage, of an mp rank.
  int stage_of(int mp) const { return mp / topology.tensor; }
  // The parameter's map for an mp rank, or expert-parallel rank; nullptr: it is not cut.
  const RankMap* map_of(int number, int shard) const;
  // Rank 0's model file and, where there is one, the file with the optimizer's global state.
  int model_file() const { return state.model_files[0]; }
};

struct ReshardOptions {
  std::set<std::string> allow_dropped;  // "client_state" (that of ranks other than 0), …
  SplitOptions splits;
  StageOptions stages;
  bool beyond_deepspeed = false;   // also what its files can say and it will not load
  int64_t moe_max_group_size = 0;  // --moe-max-group-size; 0: as regroup_experts() finds it
  bool experts_grouped = false;    // the groups of experts are those of the target's ep
};

// Throws Error(kUnsupported) for topologies that these files cannot have, and as target_maps() and
// plan_stages().
ReshardTarget make_target(const ShardedState& state, const Topology& topology, int stage,
                          const ReshardOptions& options);

// One file of the target: `mp` is its tensor-parallel rank or pipeline stage, `zero` its rank in
// the partition group (0 for model files of stages 0 to 2).
struct TargetRank {
  int mp = 0;
  int zero = 0;
};

// The buffers of a rank in the order of the optimizer's groups, and its rank in the partition group
// of one of them.
std::vector<const TargetBuffer*> buffers_of(const ReshardTarget& target, TargetRank rank);
int rank_in(const ReshardTarget& target, const TargetBuffer& buffer, TargetRank rank);

// Expert-parallel rank of a rank, and its rank among those that share its experts.
struct ExpertRank {
  int expert = 0;
  int replica = 0;
};
ExpertRank expert_rank_of(const ReshardTarget& target, TargetRank rank);

// Which groups hold experts, who holds which, and the partition groups (expert_target.cc).
// `grouped` as ReshardOptions::experts_grouped.
void prepare_experts(ReshardTarget* target, bool grouped);

// Numbers the parameters in the order in which the model creates them; AutoEP's stacks follow the
// router of their layer.
void number_parameters(ReshardTarget* target);

// Copy of a source dictionary whose values may be replaced by key.
class MappingCopy {
 public:
  MappingCopy(TorchBuilder* builder, const ShardedState& state, NodeRef mapping);
  void set(const std::string& key, NodeId value);  // replaces in place, or appends
  void set_if_present(const std::string& key, NodeId value);
  void set_after(const std::string& key, NodeId value, const std::string& neighbour);
  void erase(const std::string& key);
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
StorageFill rank_fill(const ReshardTarget& target, const TargetBuffer& buffer, int rank,
                      const std::vector<int>& leaves, DType dtype);

// universal_checkpoint_info for the target's tensor-parallel ranks (there are several).
NodeId target_split_info(TorchBuilder* builder, const ReshardTarget& target);

// An affine map, and expert_placement, as DeepSpeed writes them.
NodeId map_node(TorchBuilder* builder, const AffineMap& map);
NodeId placement_node(TorchBuilder* builder, const std::vector<std::vector<int64_t>>& placement);
// The files of the experts; and root entries of a target's model file that speak of them, those
// of that rank.
void set_expert_entries(TorchBuilder* builder, const ReshardTarget& target, TargetRank rank,
                        MappingCopy* root);
std::vector<FileBlueprint> expert_blueprints(ReshardTarget* target);
// The entry `folding` of a source file, whose place the target's file keeps.
NodeId copy_folding(TorchBuilder* builder, const ShardedState& state, int file);
// The same, to an optimizer file's entries; nothing where the target is not folded.
void add_folding(TorchBuilder* builder, const ReshardTarget& target, TargetRank rank,
                 std::vector<std::pair<std::string, NodeId>>* entries);

FileBlueprint model_blueprint(ReshardTarget* target, TargetRank rank);
// The layer files of a pipeline, as they are where the tensor-parallel ranks hold the same.
std::vector<FileBlueprint> layer_blueprints(ReshardTarget* target);
FileBlueprint optim_blueprint(ReshardTarget* target, TargetRank rank);
NodeId stage0_optimizer(ReshardTarget* target, TorchBuilder* builder, int mp);
// expp_rank_<e>_mp_rank_00_optim_states.pt of stage 0 with experts.
FileBlueprint stage0_blueprint(ReshardTarget* target, int expert_rank);
// zero/optimizer_state.pt of a universal folder whose source has no partition files (stage 0).
FileBlueprint global_state_blueprint(ReshardTarget* target);

// Whether every model file of the target has one of the source that stands for the same ranks.
bool has_same_model_files(const ReshardTarget& target);

// All files of a checkpoint of `state` at that topology and stage.
TargetFiles reshard_blueprints(const ShardedState& state, const Topology& topology, int stage,
                               const ReshardOptions& options);

}  // namespace isoshard::checkpoint
