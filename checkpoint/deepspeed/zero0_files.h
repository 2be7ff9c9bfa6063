// Stage 0: the optimizer's state by number, without parameter names
// (deepspeed/runtime/fp16/unfused_optimizer.py, state_dict). It lies in the model file; with
// experts also, once an expert-parallel rank, in expp_rank_<e>_mp_rank_00_optim_states.pt
// (deepspeed/runtime/engine.py, _save_moe_checkpoint), and the experts in files of their own.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "checkpoint/deepspeed/experts.h"
#include "checkpoint/deepspeed/model_states.h"
#include "checkpoint/deepspeed/reader.h"
#include "checkpoint/deepspeed/slot_names.h"

namespace isoshard::checkpoint {

// Experts of one layer that one rank holds, behind the module's last entry whose name starts with
// `after`.
struct ExpertBlock {
  std::string after;
  std::vector<ModuleEntry> entries;
};

// What one expert-parallel rank has; rank 0 of 1 where there are no experts.
struct Zero0Rank {
  NodeRef optimizer;  // not there: every parameter is taken as frozen
  std::vector<ExpertBlock> experts;
};

// torch's own {state, param_groups}: the optimizer's dictionary, or what its wrapper holds of it.
NodeId torch_state(const Fields& fields, NodeId optimizer);

// Reads the module and that rank's optimizer into `state`. Without the optimizer's files
// (ReadOptions::model_files_only) every parameter is frozen.
void read_zero0_rank(ShardedState* state, const ModelStates& model, const ExpertInfo& experts,
                     const Zero0Rank& rank, const ReadOptions& options, Storage& storage);

// Reads a checkpoint without experts.
void read_zero0(ShardedState* state, const ModelStates& model, const ExpertInfo& experts,
                const ReadOptions& options, Storage& storage);

// Reads a checkpoint with experts. `expert_files` are open; `optim_files` too, by
// expert-parallel rank. Throws Error(kIncomplete) for a rank without optimizer file, unless
// ReadOptions::lost_experts: then its experts have weights alone (a stack of AutoEP as a whole).
void read_zero0_experts(ShardedState* state, const ModelStates& model, const ExpertInfo& experts,
                        const std::vector<int>& expert_files, const std::map<int, int>& optim_files,
                        const ReadOptions& options, Storage& storage);

}  // namespace isoshard::checkpoint
