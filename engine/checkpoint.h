// Saving and loading for one rank of a run, with DeepSpeed's meaning (deepspeed/runtime/engine.py,
// save_checkpoint and load_checkpoint) and two corrections, which docs/deepspeed_errata.md lists:
// nothing is visible before every rank has finished, and what fails on one rank fails on all.
//
//   every rank  writes its files into a hidden folder beside the tag
//   all         agree that none has failed, and hand rank 0 their hashes
//   rank 0      manifest, one rename to the tag, then `latest`
//
// Collective: every rank of the world calls the same functions in the same order.
#pragma once

#include <exception>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "core/parallel_state.h"
#include "core/storage.h"
#include "core/training_state.h"
#include "engine/rank_files.h"

namespace isoshard::engine {

// config["checkpoint"]["tag_validation"]: what happens where ranks give different tags.
enum class TagValidation { kIgnore, kWarn, kFail };
// Throws Error(kUsage) for another text, as DeepSpeedConfigError.
TagValidation tag_validation(const Json& config);

struct SaveOptions {
  std::string tag;  // empty: "global_step<N>"
  Json client_state = Json::object();
  bool save_latest = true;
};

struct LoadOptions {
  std::string tag;  // empty: what `latest` says
  bool load_optimizer_states = true;
  bool load_lr_scheduler_states = true;
  bool load_module_only = false;
  // --clean-client-state: only what the caller gave to save; otherwise, as in DeepSpeed, whatever
  // of the file's own keys it does not take out.
  bool clean_client_state = false;
};

struct LoadResult {
  std::optional<std::string> path;  // of the model file; none: there was nothing to load
  Json client_state = nullptr;
};

class CheckpointEngine {
 public:
  // `warn` receives what DeepSpeed would log as a warning.
  CheckpointEngine(Storage& storage, const ParallelState& parallel, Json config,
                   std::function<void(const std::string&)> warn);

  // True, always; otherwise an Error on every rank: the failing rank's own, or one that names it.
  bool save_checkpoint(const TrainingState& state, const std::string& save_dir,
                       const SaveOptions& options);

  // Fills the rank's masters, optimizer states and counters, or, where a rank cannot, changes none;
  // the copies in the parameters' dtype are the caller's to refresh. The state has the shapes of
  // this run. Without load_optimizer_states, or with load_module_only, masters are the weights as
  // the parameters' dtype has them and the optimizer is new; at stage 3 too, and of the tag that
  // was named (DeepSpeed takes `latest`, or nothing: docs/deepspeed_errata.md). Without a tag and
  // `latest`: a warning, and no path. Throws Error(kNotFound) for a named tag that is not there,
  // with those that are; Error(kMismatch) where the checkpoint has other sizes or another number of
  // ranks (DeepSpeed: ZeRORuntimeException).
  LoadResult load_checkpoint(TrainingState* state, const std::string& load_dir,
                             const LoadOptions& options);

 private:
  void agree_on_tag(const std::string& tag);
  std::string tag_to_load(const std::string& load_dir, const LoadOptions& options);
  bool same_on_all_ranks(const std::string& text);
  // The rank that failed first in order of numbers, or −1. Collective.
  int first_failure(bool failed);
  std::string from_rank(int root, std::string text);
  void agree(const std::exception_ptr& failure, const std::string& act, const std::string& path,
             const std::string& safe);
  // By rank; on every rank.
  std::vector<std::string> gathered(const std::string& text);

  Storage& storage_;
  const ParallelState& parallel_;
  Json config_;
  std::function<void(const std::string&)> warn_;
};

}  // namespace isoshard::engine
