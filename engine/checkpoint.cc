// See checkpoint.h.
#include "engine/checkpoint.h"

#include <algorithm>
#include <memory>
#include <set>

#include "checkpoint/deepspeed/names.h"
#include "checkpoint/deepspeed/source.h"
#include "checkpoint/format/crc.h"
#include "checkpoint/hidden_name.h"
#include "checkpoint/manifest.h"
#include "checkpoint/publication.h"
#include "checkpoint/small_file.h"
#include "core/check.h"
#include "core/mutant.h"
#include "core/random.h"
#include "core/utf8.h"
#include "engine/rank_load.h"
#include "engine/universal_load.h"
#include "reshard/literal_file.h"
#include "reshard/manifest_check.h"

namespace isoshard::engine {
namespace {

std::vector<std::string> tags_in(Storage& storage, const std::string& folder) {
  std::vector<std::string> tags;
  if (!storage.is_directory(folder)) return tags;
  for (const DirectoryEntry& entry : storage.list(folder)) {
    const bool hidden = !entry.name.empty() && entry.name[0] == '.';
    if (entry.kind == DirectoryEntry::Kind::kDirectory && !hidden) tags.push_back(entry.name);
  }
  return tags;
}

// A tag is one folder below save_dir that nothing else is named by.
void check_tag(const std::string& tag) {
  std::string why = why_unsafe_name(tag);
  if (why.empty() && tag.find('/') != std::string::npos) why = "it names a folder inside another";
  if (why.empty() && tag[0] == '.' && !mutant("tag_with_dot")) why = "it begins with a dot";
  if ((tag == "latest" || tag == "latest_universal") && !mutant("tag_named_latest"))
    why = "the pointer has this name";
  if (why.empty()) return;
  throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                        .what = "This cannot be a tag.",
                        .entry = quote(tag),
                        .found = why,
                        .next = "choose another tag"});
}

// A folder that a save may replace: a checkpoint, or nothing.
void check_replaceable(Storage& storage, const std::string& folder) {
  if (!storage.is_directory(folder)) return;
  bool empty = true;
  for (const DirectoryEntry& entry : storage.list(folder)) {
    empty = false;
    const checkpoint::FileName name = checkpoint::parse_file_name(entry.name);
    if (name.kind == checkpoint::FileName::Kind::kModel ||
        name.kind == checkpoint::FileName::Kind::kModelOfRank) {
      return;
    }
  }
  if (empty || mutant("folder_of_others_replaced")) return;
  throw Error(ErrorInfo{.code = ErrorCode::kExists,
                        .what = "The tag's folder is there and is no checkpoint.",
                        .file = folder,
                        .next = "choose another tag, or move the folder away"});
}

constexpr const char* kAsItWas = "the checkpoint before it, and `latest`, are as they were";

constexpr int64_t kMostSideBytes = int64_t{1} << 30;

// Names in the tag's folder that a side file may have.
void check_side_files(const std::vector<SideFile>& files) {
  std::set<std::string> names;
  for (const SideFile& file : files) {
    std::string why = why_unsafe_name(file.name);
    if (why.empty() && file.name.find('/') != std::string::npos) why = "it names another folder";
    if (why.empty() && file.name[0] == '.') why = "it begins with a dot";
    if (why.empty() &&
        (checkpoint::parse_file_name(file.name).kind != checkpoint::FileName::Kind::kOther ||
         file.name.ends_with("_states.pt") || file.name == checkpoint::kManifestName)) {
      why = "a file of the checkpoint has such a name";
    }
    if (why.empty() && !names.insert(file.name).second && !mutant("side_file_twice"))
      why = "another side file has it";
    if (why.empty()) continue;
    throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                          .what = "This cannot be a side file's name.",
                          .file = file.path,
                          .entry = quote(file.name),
                          .found = why,
                          .next = "choose another name"});
  }
}

uint32_t crc_of(const std::string& text) {
  return checkpoint::crc32_of(std::as_bytes(std::span(text)));
}

// What a rank tells the others of its files, and back. The CRC is of the list: what was altered on
// its way must not be published as the hash of a file.
std::string text_of_files(const std::vector<checkpoint::ManifestFile>& files) {
  nlohmann::json list = nlohmann::json::array();
  for (const checkpoint::ManifestFile& file : files) {
    list.push_back({file.path, file.size_bytes, file.hash});
  }
  const std::string text = list.dump();
  return checkpoint::hex16(crc_of(text)) + text;
}

std::vector<checkpoint::ManifestFile> files_of_text(size_t rank, const std::string& text) {
  const std::string list = text.size() > 16 ? text.substr(16) : "";
  if (text.substr(0, 16) != checkpoint::hex16(crc_of(list))) {
    throw Error(ErrorInfo{.code = ErrorCode::kCorrupt,
                          .what = "A rank's list of files was altered on its way.",
                          .entry = "rank " + std::to_string(rank),
                          .safe = kAsItWas,
                          .next = "save again"});
  }
  std::vector<checkpoint::ManifestFile> files;
  for (const nlohmann::json& file : nlohmann::json::parse(list)) {
    files.push_back({.path = file[0], .size_bytes = file[1], .hash = file[2]});
  }
  return files;
}

}  // namespace

TagValidation tag_validation(const Json& config) {
  Json given = "Warn";
  if (config.contains("checkpoint") && config["checkpoint"].is_object() &&
      config["checkpoint"].contains("tag_validation")) {
    given = config["checkpoint"]["tag_validation"];
  }
  std::string text = given.is_string() ? given.get<std::string>() : given.dump();
  std::transform(text.begin(), text.end(), text.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  if (text == "ignore") return TagValidation::kIgnore;
  if (text == "warn") return TagValidation::kWarn;
  if (text == "fail") return TagValidation::kFail;
  throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                        .what = "The config has an unknown tag_validation (DeepSpeed: "
                                "DeepSpeedConfigError).",
                        .entry = "checkpoint.tag_validation",
                        .expected = "Ignore, Warn or Fail",
                        .found = quote(text),
                        .next = "correct the config"});
}

bool loads_universal(const Json& config) {
  const auto section = config.find("checkpoint");
  return section != config.end() && section->is_object() &&
         section->value("load_universal", Json(false)) == Json(true);
}

CheckpointEngine::CheckpointEngine(Storage& storage, const ParallelState& parallel, Json config,
                                   std::function<void(const std::string&)> warn)
    : storage_(storage), parallel_(parallel), config_(std::move(config)), warn_(std::move(warn)) {}

int CheckpointEngine::first_failure(bool failed) {
  // The lowest rank that failed is the largest of what they report.
  int64_t report = failed ? parallel_.topology.world() - parallel_.rank : 0;
  parallel_.world->all_reduce(buffer(std::span(&report, 1)), Reduction::kMax);
  CHECK(report >= 0 && report <= parallel_.topology.world(), "the ranks' status is none");
  return report == 0 || mutant("status_ignored")
             ? -1
             : parallel_.topology.world() - static_cast<int>(report);
}

bool CheckpointEngine::same_on_all_ranks(const std::string& text) {
  uint64_t word = mix(text.size());
  for (const char c : text) word = mix(word ^ static_cast<unsigned char>(c));
  const int64_t half = static_cast<int64_t>(word >> 1);
  std::vector<int64_t> most = {half, -half};
  parallel_.world->all_reduce(buffer(std::span(most)), Reduction::kMax);
  return most[0] == -most[1];
}

std::string CheckpointEngine::from_rank(int root, std::string text) {
  int64_t size = static_cast<int64_t>(text.size());
  parallel_.world->broadcast(buffer(std::span(&size, 1)), root);
  std::vector<uint8_t> bytes(text.begin(), text.end());
  bytes.resize(static_cast<size_t>(size));
  parallel_.world->broadcast(buffer(std::span(bytes)), root);
  return std::string(bytes.begin(), bytes.end());
}

std::vector<std::string> CheckpointEngine::gathered(const std::string& text) {
  const size_t world = static_cast<size_t>(parallel_.topology.world());
  const int64_t own = static_cast<int64_t>(text.size());
  std::vector<int64_t> sizes(world);
  std::vector<Buffer> targets;
  for (int64_t& size : sizes) targets.push_back(buffer(std::span(&size, 1)));
  parallel_.world->all_gather(const_buffer(std::span(&own, 1)), targets);
  const std::vector<std::vector<uint8_t>> source(world,
                                                 std::vector<uint8_t>(text.begin(), text.end()));
  std::vector<std::string> result;
  for (const std::vector<uint8_t>& part : exchange(*parallel_.world, source, sizes)) {
    result.emplace_back(part.begin(), part.end());
  }
  return result;
}

// Goes on where no rank has failed; otherwise every rank throws: its own failure, or the first
// rank's, told as such.
void CheckpointEngine::agree(const std::exception_ptr& failure, const std::string& act,
                             const std::string& path, const std::string& safe) {
  const int rank = first_failure(failure != nullptr);
  if (rank < 0) return;
  std::string text, its_safe = safe;  // the failing rank may know better
  try {
    if (failure) std::rethrow_exception(failure);
  } catch (const Error& error) {
    text = error.what();
    if (!error.info().safe.empty()) its_safe = error.info().safe;
  } catch (const std::exception& error) {
    text = error.what();
  }
  text = from_rank(rank, text);
  its_safe = from_rank(rank, its_safe);
  if (failure) std::rethrow_exception(failure);
  throw Error(ErrorInfo{.code = ErrorCode::kIncomplete,
                        .what = "The " + act + " failed on rank " + std::to_string(rank) + ".",
                        .file = path,
                        .found = text,
                        .safe = its_safe,
                        .next = "see to that rank's failure"});
}

void CheckpointEngine::agree_on_tag(const std::string& tag) {
  const TagValidation validation = tag_validation(config_);
  if (validation != TagValidation::kIgnore && !same_on_all_ranks(tag) &&
      !mutant("tag_mismatch_unchecked")) {
    const std::string text = "[rank=" + std::to_string(parallel_.rank) +
                             "] The checkpoint tag name " + quote(tag) +
                             " is not consistent across all ranks.";
    if (validation == TagValidation::kFail) {
      throw Error(ErrorInfo{.code = ErrorCode::kMismatch,
                            .what = text + " (DeepSpeed: AssertionError)",
                            .next = "give every rank the same tag"});
    }
    warn_(text + " Rank 0's is taken.");
  }
}

bool PendingSave::write_next(Storage& storage) {
  if (finished_ || cancelled_) return false;
  try {
    const checkpoint::FileBlueprint file = std::move(files_[next_++]);
    written_.push_back(
        reshard::manifest_file(reshard::write_literal_file(storage, file, folder_, true)));
  } catch (const std::exception&) {
    failure_ = std::current_exception();
  }
  finished_ = next_ == files_.size() || failure_;
  return !finished_;
}

std::shared_ptr<PendingSave> CheckpointEngine::begin_save(const TrainingState& state,
                                                          const std::string& save_dir,
                                                          const SaveOptions& options) {
  const std::string tag =
      options.tag.empty() ? "global_step" + std::to_string(state.counters.steps) : options.tag;
  agree_on_tag(tag);
  auto pending = std::make_shared<PendingSave>();
  pending->save_dir_ = save_dir;
  pending->tag_ = from_rank(0, tag);
  pending->save_latest_ = options.save_latest;
  pending->reread_ = options.reread;
  const std::string final_path = save_dir + "/" + pending->tag_;
  std::exception_ptr failure;
  try {
    if (save_dir.empty()) {
      throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                            .what = "save_dir must be a non-empty string (DeepSpeed: "
                                    "ValueError)."});
    }
    check_tag(pending->tag_);
    if (parallel_.rank == 0) {
      check_side_files(options.side_files);
      check_replaceable(storage_, final_path);
      pending->staged_ =
          std::make_shared<checkpoint::StagedFolder>(storage_, final_path, /*overwrite=*/true);
    }
    pending->files_ = rank_files(state, {parallel_.topology, parallel_.at},
                                 {.config = config_,
                                  .client_state = options.client_state,
                                  .exclude_frozen = options.exclude_frozen_parameters});
    for (const SideFile& file : options.side_files) {
      if (parallel_.rank != 0) break;
      pending->files_.push_back({.path = file.name,
                                 .kind = checkpoint::FileBlueprint::Kind::kText,
                                 .head = read_small_file(storage_, file.path, kMostSideBytes),
                                 .storages = {}});
    }
    pending->finished_ = pending->files_.empty();
    for (const checkpoint::FileBlueprint& file : pending->files_) {
      pending->size_bytes_ += static_cast<int64_t>(file.head.size());
      for (const auto& fill : file.storages) pending->size_bytes_ += fill.size_bytes();
    }
  } catch (const std::exception&) {
    failure = std::current_exception();
  }
  agree(failure, "save", final_path, kAsItWas);
  pending->folder_ = from_rank(0, pending->staged_ ? pending->staged_->path() : "");
  return pending;
}

// What all ranks have said is there; every file is read by a rank that has not written it.
void CheckpointEngine::check_files(const PendingSave& pending, const RankInventories& inventories) {
  if (parallel_.rank == 0) check_names_and_sizes(storage_, pending.folder_, inventories);
  if (!pending.reread_) return;
  const size_t next = static_cast<size_t>(parallel_.rank + 1) % inventories.size();
  check_contents(storage_, pending.folder_, next, inventories[next]);
}

// Rank 0: the manifest, and one rename.
void CheckpointEngine::publish(PendingSave* pending, const RankInventories& inventories) {
  checkpoint::Manifest manifest{.files = {}, .program_version = ISOSHARD_VERSION};
  for (const std::vector<checkpoint::ManifestFile>& files : inventories) {
    manifest.files.insert(manifest.files.end(), files.begin(), files.end());
  }
  const std::string text = checkpoint::to_json(manifest);
  if (pending->staged_->in_place()) pending->staged_->settle();
  checkpoint::write_new_file(storage_, pending->folder_ + "/" + checkpoint::kManifestName, text);
  pending->staged_->publish();
}

void CheckpointEngine::commit_save(PendingSave* pending, const std::function<bool()>& wait) {
  try {
    commit(pending, wait);
  } catch (...) {
    pending->cancelled_ = true;
    pending->staged_.reset();  // now: the writer may outlive the storage
    throw;
  }
}

void CheckpointEngine::commit(PendingSave* pending, const std::function<bool()>& wait) {
  const bool leads = parallel_.rank == 0;
  const std::string final_path = pending->save_dir_ + "/" + pending->tag_;
  const char* safe = kAsItWas;
  std::exception_ptr failure;
  const bool early = leads && mutant("publish_before_barrier");
  if (early) publish(pending, {pending->written_});
  const auto attempt = [&](auto work) {
    try {
      work();
    } catch (const std::exception&) {
      failure = std::current_exception();
    }
    agree(failure, "save", final_path, safe);
  };
  attempt([&] {
    if ((!wait() || !pending->finished()) && !mutant("unfinished_writer_published")) {
      throw Error(ErrorInfo{.code = ErrorCode::kIncomplete,
                            .what = "The writer of this rank's files has not finished in time.",
                            .file = final_path,
                            .found = std::to_string(pending->next_) + " of " +
                                     std::to_string(pending->files_.size()) + " files begun",
                            .safe = kAsItWas,
                            .next = "see whether the writer lives; save again"});
    }
    if (pending->failure_ && !mutant("writer_failure_lost"))
      std::rethrow_exception(pending->failure_);
  });
  const std::vector<std::string> parts = gathered(text_of_files(pending->written_));
  RankInventories inventories(parts.size());
  attempt([&] {
    for (size_t i = 0; i < parts.size(); ++i) inventories[i] = files_of_text(i, parts[i]);
    check_files(*pending, inventories);
  });
  attempt([&] {
    if (leads && mutant("latest_before_publish"))
      checkpoint::replace_small_file(storage_, pending->save_dir_ + "/latest", pending->tag_);
    if (leads) publish(pending, inventories);
  });
  safe = "the checkpoint is there; `latest` may be the one before";
  attempt([&] {
    if (!leads || !pending->save_latest_ || mutant("latest_not_moved")) return;
    checkpoint::replace_small_file(storage_, pending->save_dir_ + "/latest", pending->tag_);
  });
  if (leads) warn_of_replaced(pending->staged_->left_behind());
}

// Behind all that the ranks do together, as the caller's function may do anything. The save is made
// whatever that does.
void CheckpointEngine::warn_of_replaced(const std::string& left_behind) const {
  if (left_behind.empty()) return;
  const bool is_trash =
      checkpoint::split_path(left_behind).name.starts_with(checkpoint::kTrashMark);
  try {
    warn_("The checkpoint that this save replaced could not be removed: " + quote(left_behind) +
          (is_trash ? "; isoshard doctor --clean removes it."
                    : "; it is whole: when nobody misses it, delete it yourself."));
  } catch (const std::exception&) {
    // A warning that cannot be given.
  }
}

bool CheckpointEngine::save_checkpoint(const TrainingState& state, const std::string& save_dir,
                                       const SaveOptions& options) {
  const std::shared_ptr<PendingSave> pending = begin_save(state, save_dir, options);
  while (pending->write_next(storage_)) {
  }
  commit_save(pending.get(), [] { return true; });
  return true;
}

LoadResult CheckpointEngine::load_checkpoint(TrainingState* state, const std::string& load_dir,
                                             const LoadOptions& options) {
  LoadResult result;
  TrainingState loaded = *state;
  std::exception_ptr failure;
  std::string tag;
  try {
    if (parallel_.rank == 0) tag = tag_to_load(load_dir, options);
  } catch (const std::exception&) {
    failure = std::current_exception();
  }
  const std::string safe = "no rank's state was changed";
  agree(failure, "load", load_dir, safe);
  tag = from_rank(0, tag);
  if (tag.empty()) {
    warn_("Unable to find latest file at " + load_dir +
          "/latest, if trying to load latest checkpoint please ensure this file exists or pass an "
          "explicit checkpoint tag when loading a checkpoint.");
    return result;
  }
  try {
    const std::string folder = load_dir + "/" + tag;
    result =
        loads_universal(config_)
            ? load_universal(storage_, folder, options, &loaded)
            : load_rank(storage_, folder, {parallel_.topology, parallel_.at}, options, &loaded);
  } catch (const std::exception&) {
    failure = std::current_exception();
  }
  if (mutant("failed_load_changes_state")) *state = loaded;
  agree(failure, "load", load_dir, safe);
  *state = std::move(loaded);
  return result;
}

// The tag that is there; empty where none is named and there is no `latest`.
std::string CheckpointEngine::tag_to_load(const std::string& load_dir, const LoadOptions& options) {
  std::string tag = options.tag;
  if (tag.empty()) {
    const bool universal = loads_universal(config_);
    const std::string latest = load_dir + (universal ? "/latest_universal" : "/latest");
    if (!storage_.is_file(latest) && universal) {
      throw Error(ErrorInfo{.code = ErrorCode::kNotFound,
                            .what = "There is no universal checkpoint (DeepSpeed: ValueError, "
                                    "\"Invalid for universal checkpoint\").",
                            .file = latest,
                            .next = "isoshard convert --to universal, or name a tag"});
    }
    if (!storage_.is_file(latest)) return "";
    tag = checkpoint::pointer_text(storage_, latest);
  }
  const std::string folder = load_dir + "/" + tag;
  const bool plain = why_unsafe_name(tag).empty() && tag.find('/') == std::string::npos;
  if (plain && storage_.is_directory(folder)) return tag;
  std::string there;
  for (const std::string& name : tags_in(storage_, load_dir)) there += " " + quote(name);
  throw Error(ErrorInfo{.code = ErrorCode::kNotFound,
                        .what = "There is no such tag (DeepSpeed: an empty AssertionError).",
                        .file = load_dir,
                        .entry = quote(tag),
                        .expected = there.empty() ? "a tag" : "one of:" + there,
                        .next = "name one of them, or none to take `latest`"});
}

}  // namespace isoshard::engine
