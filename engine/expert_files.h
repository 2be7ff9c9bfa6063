// The files of experts, in the form of AutoEP (deepspeed/module_inject/auto_ep_layer.py;
// deepspeed/runtime/engine.py, _save_moe_checkpoint).
//
//   layer_L_expert_E_mp_rank_XX_model_states.pt   stages 0 to 2: w1, w2, w3 of one expert; XX: 00,
//                                                 or the tensor-parallel rank that writes it, where
//                                                 these share the experts (engine/folding.h)
//   expp_rank_R_mp_rank_00_optim_states.pt        stage 0: the optimizer of expert-parallel rank R
#pragma once

#include <string>
#include <vector>

#include "checkpoint/torch_builder.h"
#include "engine/rank_files.h"

namespace isoshard::engine {

// One layer of experts: the parameters path.experts.w1, w2, w3.
struct ExpertLayerPlace {
  int64_t layer = 0;  // counts the layers of experts
  std::string path;   // "model.layers.0.mlp"
  int64_t experts = 0;
  int64_t begin = 0;  // this rank's experts [begin, begin + held)
  int64_t held = 0;
};
std::vector<ExpertLayerPlace> expert_layers(const TrainingState& state);
bool has_experts(const TrainingState& state);

// "ep_size_2".
std::string expert_group_name(const Topology& topology);

// The second name of a router's parameter ("….gate.gate.weight" of "….router.gate.weight"), or "".
std::string router_alias(const std::string& name);

// "layer_0_expert_3_mp_rank_00_model_states.pt".
std::string expert_file_name(int64_t layer, int64_t expert, int tensor_rank);

// ds_autoep_layers as this rank writes it.
checkpoint::NodeId expert_layers_node(checkpoint::TorchBuilder* builder, const TrainingState& state,
                                      const RankPlace& place,
                                      const std::vector<ExpertLayerPlace>& layers);

// Of those who would write the same names the first rank writes.
void add_expert_files(const TrainingState& state, const RankPlace& place,
                      const SaveContent& content, std::vector<checkpoint::FileBlueprint>* files);

}  // namespace isoshard::engine
