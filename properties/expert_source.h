// A made-up job with mixture of experts, native or AutoEP's, and its stage-0 checkpoint as
// DeepSpeed would have saved it: pickles by hand after the format's description. Nothing of the
// writers is used. AutoEP's stacks are cut along their first axis, the first ranks taking one more
// expert where they do not divide.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "core/storage.h"
#include "properties/model.h"

namespace isoshard::properties {

// An expert's layer and number from its name; layer −1 for every other parameter.
struct ExpertPlace {
  int layer = -1;
  int number = 0;
};
ExpertPlace expert_place(const std::string& name);
// The layer of AutoEP's stack of that name; −1 for every other parameter.
int stack_layer(const std::string& name);
bool is_expert(const std::string& name);

// What the file of one expert holds: names, and numbers of the parameters, of which it has one
// slice (AutoEP) or all.
std::vector<std::pair<std::string, size_t>> expert_entries(const Model& model, ExpertPlace place);
std::string expert_bytes(const Model& model, ExpertPlace place, size_t parameter);

// What an expert-parallel rank trains of the experts (the dense parameters are frozen in it), or,
// with rank −1, the dense parameters alone (the experts are). Numbers and values stay the model's.
Model trained_by(const Model& model, const Job& job, int rank);

// With the experts in the groups that they have in that job: each rank fills one after the other,
// up to `most` elements (deepspeed/moe/utils.py).
Model in_groups(const Model& model, const Job& job);

// The name that a rank's module gives an expert: numbers count from its first.
std::string local_name(const Model& model, const Job& job, size_t parameter);

// Writes the files of stage 0 into `folder`, which is made.
void write_expert_source(Storage& storage, const std::string& folder, const Model& model,
                         const Job& job);

}  // namespace isoshard::properties
