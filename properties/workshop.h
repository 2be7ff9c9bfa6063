// The pipeline under test, on a disk in memory: a hand-made source is read, resharded, converted
// and read again by production code. One workshop a case; a mutant, if any, works inside it.
#pragma once

#include <string>

#include "checkpoint/deepspeed/weights_blueprint.h"
#include "checkpoint/memory_storage.h"
#include "properties/model.h"
#include "properties/mutants.h"
#include "reshard/digest.h"

namespace isoshard::properties {

class Workshop {
 public:
  explicit Workshop(const Model& model, Mutant mutant = Mutant::kNone);

  Storage& storage() { return storage_; }

  // A hand-made checkpoint (stages 1 to 3), written to `folder` and read back.
  checkpoint::ShardedState source(const Job& job, const std::string& folder);
  // The state with the splits of a made-up run of two tensor-parallel ranks, where the job needs
  // them and the state has none.
  checkpoint::ShardedState with_splits(const checkpoint::ShardedState& state, const Job& job);
  // Production's files of `state` for a job, written to `folder` and read back.
  checkpoint::ShardedState reshard(const checkpoint::ShardedState& state, const Job& job,
                                   const std::string& folder);
  // Only the blueprints of the above.
  std::vector<checkpoint::FileBlueprint> blueprints(const checkpoint::ShardedState& state,
                                                    const Job& job) const;
  checkpoint::ShardedState universal(const checkpoint::ShardedState& state,
                                     const std::string& folder);
  checkpoint::ShardedState weights(const checkpoint::ShardedState& state, const std::string& folder,
                                   const checkpoint::WeightsOptions& options);

  // Reads a folder; a shuffle other than 0 lists it in another order.
  checkpoint::ShardedState read(const std::string& folder, uint64_t shuffle = 0);
  // Stage 0 without --param-order: names are inferred, or the file is refused.
  checkpoint::ShardedState read_inferring(const std::string& folder);

  reshard::Digest digest(const checkpoint::ShardedState& state);

 private:
  checkpoint::ShardedState write(const checkpoint::ShardedState& state,
                                 std::vector<checkpoint::FileBlueprint> files,
                                 const std::string& folder);

  const Model& model_;
  Mutant mutant_;
  checkpoint::MemoryStorage storage_;
};

}  // namespace isoshard::properties
