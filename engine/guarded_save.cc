// See guarded_save.h.
#include "engine/guarded_save.h"

#include "core/error.h"
#include "core/mutant.h"

namespace isoshard::engine {

std::string GuardedSave::failure_text(const std::exception& failure, int64_t bytes,
                                      const std::string& folder) const {
  std::string text = "The save did not succeed; training goes on.";
  const auto* error = dynamic_cast<const Error*>(&failure);
  if (error != nullptr) {
    const ErrorInfo& info = error->info();
    text += " " + info.what;
    if (!info.file.empty()) text += " File: " + info.file + ".";
    if (!info.entry.empty()) text += " Entry: " + info.entry + ".";
    if (!info.expected.empty()) text += " Expected: " + info.expected + ".";
    if (!info.found.empty()) text += " Found: " + info.found + ".";
  } else {
    text += std::string(" ") + failure.what();
  }
  if (error != nullptr && error->info().code == ErrorCode::kNoSpace) {
    text += " This rank has " + std::to_string(bytes) + " bytes to write";
    try {
      const int64_t free = storage_.free_space(folder).bytes;
      text += ", " + std::to_string(free) + " are free";
      if (free < bytes && !mutant("guarded_missing_bytes"))
        text += ": " + std::to_string(bytes - free) + " are missing";
    } catch (const std::exception&) {
      text += "; how many are free the disk does not say";
    }
    text += ".";
  }
  if (error != nullptr && !error->info().safe.empty()) text += " Now: " + error->info().safe + ".";
  text += last_durable_.empty() ? " Nothing was saved before that is known here."
                                : " Safe: " + last_durable_ + ".";
  if (error != nullptr && !error->info().next.empty()) text += " Next: " + error->info().next + ".";
  return text;
}

GuardedResult GuardedSave::save(const TrainingState& state, const GuardedOptions& options) {
  GuardedResult result;
  if (!options.enabled) return result;
  int64_t bytes = 0;
  try {
    const std::shared_ptr<PendingSave> pending =
        engine_.begin_save(state, options.output_dir,
                           {.tag = options.tag,
                            .client_state = options.client_state,
                            .side_files = options.side_files});
    bytes = pending->size_bytes();
    while (pending->write_next(storage_)) {
    }
    engine_.commit_save(pending.get(), [] { return true; });
    result.saved = true;
    result.path = last_durable_ = options.output_dir + "/" + pending->tag();
  } catch (const std::exception& failure) {
    result.message = failure_text(failure, bytes, options.output_dir);
    if (!mutant("guarded_failure_silent")) log_(result.message);
  }
  if (parallel_.rank == 0 && options.after) {
    try {
      options.after();
    } catch (const std::exception& failure) {
      log_(std::string("What was to run after the save has failed: ") + failure.what());
    }
  }
  return result;
}

}  // namespace isoshard::engine
