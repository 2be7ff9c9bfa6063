// Shards of tensor-parallel ranks → logical tensors. Every mp rank's files are read as a checkpoint
// of their own, with shards for shapes; this joins them. Link 7 of the tensor's journey.
#pragma once

#include <string>
#include <vector>

#include "checkpoint/deepspeed/experts.h"
#include "checkpoint/deepspeed/model_states.h"
#include "checkpoint/deepspeed/tensor_parallel.h"

namespace isoshard::checkpoint {

// What the files of one mp rank say; its leaves' fragments point into the files of the whole.
struct MpPart {
  ShardedState state;
  ModelStates model;
};

// "tp rank 1": whose copy a replica is.
std::string rank_name(size_t rank);

// Appends what is not there yet.
void add_once(std::vector<std::string>* list, const std::vector<std::string>& more);

// A part that shares the folder, topology and version of `whole`, and has its files until they are
// moved back: whole->files = std::move(part.state.files).
MpPart lend_files(ShardedState* whole, ModelStates model = {});

// Adds the joined parameters, buffers, aliases, groups and leaves to `whole`, whose files are open.
// Parts stand in the order of their tensor-parallel rank. Throws Error(kMismatch) where they do not
// fit together. Whether replicas are equal is not looked at: the pairs go to whole->replicas.
void merge_tensor_ranks(ShardedState* whole, const std::vector<MpPart>& parts,
                        const TensorParallelInfo& info);

// The same for the experts of AutoEP: parts stand in the order of their expert-parallel rank, and
// their parameters join the groups that `whole` already has.
void merge_expert_ranks(ShardedState* whole, const std::vector<MpPart>& parts,
                        const ExpertInfo& experts);

// The same for native experts, whose names are those among all ranks' experts: they stand in the
// order that a model of one expert-parallel rank has, layer by layer, by their numbers.
void join_native_ranks(ShardedState* whole, const std::vector<MpPart>& parts);

// Fragments of a tensor from those of its shards by rank; nullptr: the shard has no element.
// Padding rows of a vocabulary are left out, or, `padding`, all that there is.
std::vector<FileFragment> compose(const TensorSplit& split, const std::vector<const Leaf*>& shards,
                                  bool padding = false);

}  // namespace isoshard::checkpoint
