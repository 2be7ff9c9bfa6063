// A made-up job with native mixture of experts, and its stage-0 checkpoint as DeepSpeed would have
// saved it: pickles by hand after the format's description. Nothing of the writers is used.
#pragma once

#include <string>

#include "core/storage.h"
#include "properties/model.h"

namespace isoshard::properties {

// An expert's layer and number from its name; layer −1 for every other parameter.
struct ExpertPlace {
  int layer = -1;
  int number = 0;
};
ExpertPlace expert_place(const std::string& name);

// What an expert-parallel rank trains of the experts (the dense parameters are frozen in it), or,
// with rank −1, the dense parameters alone (the experts are). Numbers and values stay the model's.
Model trained_by(const Model& model, const Job& job, int rank);

// The name that a rank's module gives an expert: numbers count from its first.
std::string local_name(const Model& model, const Job& job, size_t parameter);

// Writes the files of stage 0 into `folder`, which is made.
void write_expert_source(Storage& storage, const std::string& folder, const Model& model,
                         const Job& job);

}  // namespace isoshard::properties
