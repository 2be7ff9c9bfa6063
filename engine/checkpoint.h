// Saving and loading for one rank of a run, with DeepSpeed's meaning (deepspeed/runtime/engine.py,
// save_checkpoint and load_checkpoint) and two corrections, which docs/deepspeed_errata.md lists:
// nothing is visible before every rank has finished, and what fails on one rank fails on all.
//
//   every rank  writes its files into a hidden folder beside the tag
//   all         agree that none has failed, and hand each other their files' names, sizes, hashes
//   rank 0      opens every file again; every rank reads those of the next (published_files.h)
//   rank 0      manifest, one rename to the tag, then `latest`
//
// Collective: every rank of the world calls the same functions in the same order.
#pragma once

#include <atomic>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/manifest.h"
#include "checkpoint/publication.h"
#include "core/parallel_state.h"
#include "core/storage.h"
#include "core/training_state.h"
#include "engine/published_files.h"
#include "engine/rank_files.h"

namespace isoshard::engine {

// config["checkpoint"]["tag_validation"]: what happens where ranks give different tags.
enum class TagValidation { kIgnore, kWarn, kFail };
// config["checkpoint"]["load_universal"]: load_checkpoint reads the universal form of any topology
// and stage, which `latest_universal` names.
bool loads_universal(const Json& config);
// Throws Error(kUsage) for another text, as DeepSpeedConfigError.
TagValidation tag_validation(const Json& config);

// A file that rank 0 carries into the tag's folder, such as a tokenizer's.
struct SideFile {
  std::string name;  // there; no '/' in it, and none of DeepSpeed's names
  std::string path;  // where it is now
};

struct SaveOptions {
  std::string tag;  // empty: "global_step<N>"
  Json client_state = Json::object();
  bool save_latest = true;
  bool exclude_frozen_parameters = false;
  std::vector<SideFile> side_files = {};
  // Every rank reads the next one's files before they are published. False: their names and sizes
  // are looked at, and a file of the right size with other bytes is found by `verify` alone.
  bool reread = true;
};

// A save that has begun: the rank's files as they were at the call. The run may go on, and change
// its state, while they are written. Whoever writes holds the shared pointer.
class PendingSave {
 public:
  // Writes one file more, on any thread, but one at a time. False: there is none left, or one has
  // failed, or the commit did not wait for it any longer. Throws no Error; commit_save() tells.
  bool write_next(Storage& storage);
  bool finished() const { return finished_; }
  const std::string& tag() const { return tag_; }
  int64_t size_bytes() const { return size_bytes_; }  // of what this rank's files will hold

 private:
  friend class CheckpointEngine;
  std::string save_dir_, tag_, folder_;
  std::atomic<bool> cancelled_{false};
  std::shared_ptr<checkpoint::StagedFolder> staged_;  // on rank 0
  std::vector<checkpoint::FileBlueprint> files_;
  std::vector<checkpoint::ManifestFile> written_;
  std::atomic<size_t> next_{0};
  int64_t size_bytes_ = 0;
  std::atomic<bool> finished_{false};
  std::exception_ptr failure_;
  bool save_latest_ = true;
  bool reread_ = true;
};

struct LoadOptions {
  std::string tag;                 // empty: what `latest` says
  bool load_module_strict = true;  // false: parameters that the file has not are as they were
  bool load_optimizer_states = true;
  bool load_lr_scheduler_states = true;
  bool load_module_only = false;
  // --clean-client-state: only what the caller gave to save; otherwise, as in DeepSpeed, whatever
  // of the file's own keys it does not take out.
  bool clean_client_state = false;
  // In place of the module's own loading, of stages 0 to 2 and where the optimizer's states are not
  // loaded: what the file's module holds under a name (nothing: it is not there), and the parameter
  // whose whole shard is to be filled.
  using Source = std::function<std::optional<std::vector<float>>(const std::string& name)>;
  std::function<void(const Source& source, const TrainedParameter& parameter,
                     std::vector<float>* values)>
      custom_load_fn = {};
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

  // The same in three parts, for a writer beside the run (DeepSpeed's decoupled checkpoint engine):
  // begin_save returns once the snapshot is taken, and `latest` moves in commit_save. Both are
  // collective. `wait` returns whether this rank's writer has finished, at the latest at the
  // caller's deadline; where one has not, or has failed, the commit fails on every rank, and
  // nothing is visible of it.
  std::shared_ptr<PendingSave> begin_save(const TrainingState& state, const std::string& save_dir,
                                          const SaveOptions& options);
  void commit_save(PendingSave* pending, const std::function<bool()>& wait);

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
  void commit(PendingSave* pending, const std::function<bool()>& wait);
  void check_files(const PendingSave& pending, const RankInventories& inventories);
  void publish(PendingSave* pending, const RankInventories& inventories);
  void warn_of_replaced(const std::string& left_behind) const;
  std::string tag_to_load(const std::string& load_dir, const LoadOptions& options);
  bool same_on_all_ranks(const std::string& text);
  // The rank that failed first in order of numbers, or −1. Collective.
  int first_failure(bool failed);
  std::string from_rank(int root, std::string text);
  void agree(const std::exception_ptr& failure, const std::string& act, const std::string& path,
             const std::string& safe);
  // What every rank gives, by rank. Collective.
  std::vector<std::string> gathered(const std::string& text);

  Storage& storage_;
  const ParallelState& parallel_;
  Json config_;
  std::function<void(const std::string&)> warn_;
};

}  // namespace isoshard::engine
