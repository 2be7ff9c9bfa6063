// Which files a tag folder holds, by the rank that their names say; and that none is missing.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "core/storage.h"

namespace isoshard::checkpoint {

// What this version reads, and what to do with the rest; for messages.
extern const char* const kCovered;
extern const char* const kElsewhere;

struct Inventory {
  using ByRank = std::map<int, std::string>;  // rank of the partition group → file name
  std::map<int, std::string> model;           // by mp rank; stages 0 to 2
  std::map<int, ByRank> model_of_rank;        // by mp rank; stage 3
  std::map<int, ByRank> optim;                // by mp rank
  std::vector<std::string> experts;           // one file an expert
  ByRank expert_optim;                        // stage 0: by expert-parallel rank
  std::vector<std::string> layers;            // one file a layer of a pipeline
  std::vector<std::string> other;
  bool stage3() const { return !model_of_rank.empty(); }
  // Number of mp ranks, counted by the model files.
  size_t mp_ranks() const { return stage3() ? model_of_rank.size() : model.size(); }
  const std::string& first_model() const {
    return stage3() ? model_of_rank.begin()->second.begin()->second : model.begin()->second;
  }
};

// Throws the Error for files that two saves have left, and for kinds that are not covered.
Inventory take_inventory(Storage& storage, const std::string& folder);

// Files of ranks 0 … count−1, all there and no more, in order; otherwise Error(kIncomplete,
// kMismatch) about `what` in `folder`.
std::vector<std::string> complete(const std::map<int, std::string>& files, int64_t count,
                                  const std::string& folder, const std::string& what);

}  // namespace isoshard::checkpoint
