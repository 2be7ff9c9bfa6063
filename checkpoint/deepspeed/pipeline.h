// Pipeline stages: each mp rank holds some layers; the modules lie in one file a layer and tensor-
// parallel rank (deepspeed/runtime/pipe/module.py, save_state_dict), with names local to the layer.
// A tied layer lies on several stages, under one name.
//
//   mp rank = stage · tp + tensor-parallel rank       layer_NN-model_TT-model_states.pt
#pragma once

#include <set>
#include <string>
#include <vector>

#include "checkpoint/deepspeed/merge.h"

namespace isoshard::checkpoint {

// 3 for "3.up.weight"; kNoLayer for others, as a tied module's.
constexpr int kNoLayer = -1;
int layer_in_name(const std::string& parameter);

// The key of the TiedLayerSpec: "embed" for "tied_modules.embed.weight"; empty for others.
std::string tied_key(const std::string& parameter);

// What one stage's optimizer holds.
struct StageHolding {
  std::set<int> layers;        // with parameters of their own
  std::set<std::string> keys;  // of tied modules
};
std::vector<StageHolding> stage_holdings(const ShardedState& state);

// The number in a layer file's name, which check_layer_files() has seen.
int layer_of_file(const ShardedState& state, int file);

// Adds the parameters of all stages, in order, to `whole`. What two stages hold under one name must
// agree: the pairs go to whole->replicas.
void join_stages(ShardedState* whole, const std::vector<MpPart>& stages);

// The layer files by tensor-parallel rank: the same layers for each, one file a layer, named as
// DeepSpeed names it, or Error(kMismatch, kIncomplete).
std::vector<std::vector<std::string>> layer_files_by_rank(const std::vector<std::string>& names,
                                                          int ranks, const std::string& folder);
// Its name for a tensor-parallel rank of `ranks`.
std::string layer_file_name(int layer, int rank, int ranks);

// What merge_tensor_ranks() does not join: who holds what, and the replicas that each tensor-
// parallel rank's stages have among themselves. `parts` by tensor-parallel rank.
void adopt_stages(ShardedState* whole, const std::vector<MpPart>& parts);

// Every parameter and every buffer has its copy: Error(kIncomplete). Buffers of tied modules:
// Error(kUnsupported).
void check_layer_copies(const ShardedState& state, const std::set<std::string>& buffers);

// The layer files (open, by number in the state's files): copies in the model's dtype. Tensor
// "up.weight" of layer 3 is parameter "3.up.weight", or one of a tied module that has no copy yet;
// what is neither is a frozen parameter, or a buffer if `buffers` names it. Error(kUnsupported)
// where several tied modules could be meant.
void add_layer_copies(ShardedState* state, const std::set<std::string>& buffers,
                      const std::vector<int>& files);

}  // namespace isoshard::checkpoint
