// The entry `folding` of a run whose expert-parallel groups lie across tensor-parallel ranks:
// AutoEP folded with AutoTP (deepspeed/runtime/engine.py and module_inject/auto_ep_folding.py,
// 0.19.8). Of the dp·tp ranks, rank g = d·tp + t is tensor-parallel rank t, expert-parallel rank g
// mod ep, and number g div ep among those who hold the same experts.
//
//   model file     group dense_dp,   family dense, and the family of each entry of the module
//   expert file    group edp,        family routed_expert
//   optimizer      group per_family, family zero_optimizer_state, and who shares each parameter
#pragma once

#include <string>
#include <vector>

#include "checkpoint/torch_builder.h"
#include "engine/rank_files.h"
#include "engine/rank_reader.h"

namespace isoshard::engine {

enum class FoldedFile { kModel, kExpert, kOptimizer };

bool is_folded(const TrainingState& state, const Topology& topology);

// `module`: the names of the entries of a model file's module.
checkpoint::NodeId folding_node(checkpoint::TorchBuilder* builder, const TrainingState& state,
                                const RankPlace& place, FoldedFile file,
                                const std::vector<std::string>& module = {});

// Throws Error(kMismatch) where the file says another place than this rank's, or none at all, and
// where it says one and the run is not folded. An expert's file may be of another rank that holds
// the same experts.
void check_folding(const RankReader& file, const TrainingState& state, const RankPlace& place,
                   FoldedFile kind);

}  // namespace isoshard::engine
