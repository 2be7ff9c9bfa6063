// Mixture of experts: which parameters are experts, who holds them, and where their copies in the
// model's dtype lie. AutoEP (deepspeed/module_inject/auto_ep_layer.py) stacks a layer's experts in
// w1, w2, w3 of shape [experts, …] and records ds_autoep_layers; native MoE (deepspeed/moe) names
// every expert by a number that is local to its expert-parallel rank.
//
//   dp 4, ep 2   ranks that share one expert-parallel rank's experts (its ZeRO partition group)
//   expert before data (default)      e0: 0 2   e1: 1 3
//   data before expert                e0: 0 1   e1: 2 3
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/deepspeed/model_states.h"
#include "checkpoint/tensor_split.h"

namespace isoshard::checkpoint {

// One AutoEP layer.
struct ExpertLayer {
  int64_t layer_id = -1;
  std::string module_path;
  std::string prefix;  // expert_key_prefix: module_path + ".experts"
  int64_t experts = 0;
  int64_t ep_size = 0;
  std::vector<std::vector<int64_t>> placement;  // by rank: ids of its experts, in packed order
  int64_t held_by(int rank) const {
    return static_cast<int64_t>(placement.at(static_cast<size_t>(rank)).size());
  }
  bool operator==(const ExpertLayer&) const = default;
};

// Blocks of consecutive experts by rank, the first ranks taking one more where they do not divide,
// which DeepSpeed's metadata can say and its models cannot have (auto_ep_config.py: ValueError).
std::vector<std::vector<int64_t>> placed_in_blocks(int64_t experts, int64_t ranks);

// How the names of its router's parameters begin: "model.layers.0.mlp.router.".
std::string router_of(const ExpertLayer& layer);

class ExpertInfo {
 public:
  // Of rank 0's model file. Throws Error(kCorrupt, kUnsupported) for metadata that DeepSpeed
  // refuses, naming its error's type.
  ExpertInfo(const ShardedState& state, const ModelStates& model);

  bool present() const { return autoep() || native_; }
  bool autoep() const { return !layers_.empty(); }
  bool native() const { return native_; }
  const std::vector<ExpertLayer>& layers() const { return layers_; }

  // A parameter of the optimizer that is (part of) an expert.
  bool is_expert(const std::string& name) const;
  // The AutoEP layer of "prefix.w1", ".w2", ".w3"; nullptr for any other name.
  const ExpertLayer* layer_of(const std::string& name) const;
  // The AutoEP layer whose module holds this name; nullptr for none.
  const ExpertLayer* layer_around(const std::string& name) const;

  // A model file in which second names of a router (gate.gate.weight beside router.gate.weight) are
  // tied names; shared_params does not list them, and the file holds their bytes twice.
  ModelStates with_router_aliases(const ShardedState& state, const ModelStates& model) const;

  // Expert-parallel ranks, given the size of an expert's partition group among `dp` ranks.
  int expert_ranks(int dp, int64_t partition_count) const;
  // Ranks of the partition group of expert-parallel rank `rank`, in order.
  std::vector<int> partition_ranks(int rank, int expert_ranks, int dp) const;

  // Rank 0's model file as expert-parallel rank `rank` would have it: shapes of its own experts.
  ModelStates of_rank(const ModelStates& model, int rank) const;

  // The shapes of a stack on all ranks, given rank 0's.
  std::vector<std::optional<Shape>> shards_of(const ExpertLayer& layer, const Shape& first) const;
  // AutoEP: the experts of all ranks, stacked by their ids. Shards by rank.
  TensorSplit split_of(const std::string& name,
                       const std::vector<std::optional<Shape>>& shards) const;
  // Native: the name with the expert's number among all experts; `local` of them on each rank.
  static std::string global_name(const std::string& name, int rank, int64_t local);
  // Native: "…deepspeed_experts." and the number behind it; nothing for other names.
  static std::optional<std::pair<std::string, int64_t>> expert_number(const std::string& name);

 private:
  void read_layers(const Fields& fields, NodeId list);
  void read_blocks(const Fields& fields, NodeId entry, ExpertLayer* layer) const;
  void read_placement(const Fields& fields, NodeId entry, ExpertLayer* layer) const;

  std::string path_;  // of the model file
  std::vector<ExpertLayer> layers_;
  std::map<std::string, size_t> by_prefix_;
  bool native_ = false;
  bool data_before_expert_ = false;
};

// How the shards [local experts, rows, columns] of a stack lie in the whole of it.
TensorSplit stack_split(const ExpertLayer& layer, int64_t rows, int64_t columns);

// AutoEP layers of a model file: ds_autoep_layers, or the older autoep_layers; kNoNode if none.
NodeId autoep_layers(const Fields& fields, NodeId holder);

// num_experts of a model file: a number for each layer of experts; nothing if it is no list.
std::optional<std::vector<NodeId>> expert_counts(const Fields& fields);

// A group whose `moe` is True holds experts alone, and then they stand in no other group
// (deepspeed/moe/utils.py).
bool is_group_of_experts(const Fields& fields, NodeId hyper);

// The optimizer's groups, by what they hold; those with experts hold nothing else, or
// Error(kCorrupt).
struct ExpertGroups {
  std::vector<bool> dense, expert;
};
ExpertGroups groups_of_experts(const ShardedState& state, const ModelStates& model,
                               const ExpertInfo& experts);

// Experts of stages 1 to 3: the groups of the optimizer that hold them (sub-groups at stage 3) are
// read rank by rank and joined; the others are read by read_zero12, read_zero3 into `state`.
// `any_format` as ReadOptions::any_expert_format.
void read_experts(ShardedState* state, const ModelStates& model, const ExpertInfo& experts,
                  bool stage3, bool any_format);

// Where no file holds experts in the model's dtype it is that of the other parameters.
void give_expert_dtype(ShardedState* state, const ModelStates& model, const ExpertInfo& experts);

// Throws Error(kIncomplete): none of `files` expert files holds the tensor.
[[noreturn]] void refuse_missing_expert(const ShardedState& state, const std::string& name,
                                        size_t files);

// Whether the file says that AutoEP is folded with AutoTP.
bool is_folded(const TorchFile& document);

// Throws Error(kUnsupported): both files, by number, hold one expert.
[[noreturn]] void refuse_second_file(const ShardedState& state, int first, int second);

// The per-expert files (open, by number in the state's files): copies in the model's dtype.
void add_expert_copies(ShardedState* state, const ExpertInfo& experts,
                       const std::vector<int>& files);

}  // namespace isoshard::checkpoint
