// Saving from a training loop that must go on whatever becomes of the save: a full disk, a quota, a
// read-only or stale file system is one line in the log, and the state is not touched.
//
// Collective: every rank of the world calls save() at the same step with the same `enabled`. A save
// behind `if rank == 0` waits for ranks that never come; simulated ranks report that at once.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "engine/checkpoint.h"

namespace isoshard::engine {

struct GuardedOptions {
  bool enabled = false;
  std::string output_dir;
  std::string tag;  // empty: "global_step<N>"
  Json client_state = Json::object();
  std::vector<SideFile> side_files = {};  // such as a tokenizer's; rank 0 carries them
  // On rank 0 when the save has ended, whether it succeeded or not: closing an experiment's logger
  // and the like. What it throws is logged, and never stands in for what the save has to say.
  std::function<void()> after = {};
};

struct GuardedResult {
  bool saved = false;
  std::string path;     // of the checkpoint that was saved
  std::string message;  // why it was not; empty where it was, or was not enabled
};

class GuardedSave {
 public:
  // What it is given outlives it. `log` receives one line at a time.
  GuardedSave(CheckpointEngine& engine, Storage& storage, const ParallelState& parallel,
              std::function<void(const std::string&)> log)
      : engine_(engine), storage_(storage), parallel_(parallel), log_(std::move(log)) {}

  // Throws nothing of std::exception's. The log of a failed save says what failed, where, and which
  // checkpoint is safe; where the disk is full, also how many bytes this rank has to write and how
  // many are free.
  GuardedResult save(const TrainingState& state, const GuardedOptions& options);

  // The last checkpoint that is known to be whole and durable; "" before the first save, unless the
  // one that the run was resumed from is named.
  const std::string& last_durable() const { return last_durable_; }
  void set_last_durable(const std::string& path) { last_durable_ = path; }

 private:
  std::string failure_text(const std::exception& failure, int64_t bytes,
                           const std::string& folder) const;

  CheckpointEngine& engine_;
  Storage& storage_;
  const ParallelState& parallel_;
  std::function<void(const std::string&)> log_;
  std::string last_durable_;
};

}  // namespace isoshard::engine
