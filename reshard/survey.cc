// See survey.h.
#include "reshard/survey.h"

#include <algorithm>

#include "checkpoint/deepspeed/experts.h"
#include "checkpoint/deepspeed/names.h"
#include "checkpoint/deepspeed/source.h"
#include "checkpoint/format/record_proof.h"
#include "core/error.h"
#include "reshard/parallel.h"

namespace isoshard::reshard {

using checkpoint::Fields;
using checkpoint::FileName;
using checkpoint::Inventory;
using checkpoint::kNoNode;
using checkpoint::ModelStates;
using checkpoint::one_line;
using checkpoint::TorchFile;
using checkpoint::TornFile;
using checkpoint::TornStorage;
using checkpoint::why_unproven;
using checkpoint::ZipRecord;
using Health = SurveyedFile::Health;

namespace {

constexpr int64_t kNumberBytes = 64;
constexpr size_t kMostMissing = 10'000;
constexpr int64_t kMostHeldBytes = int64_t{2} << 30;  // of memory, by all stand-ins
constexpr const char* kNext =
    "docs/KNOWN_GAPS.md says what salvage leaves out; bring the damaged files from another copy";

// What says nothing of the file: no handles, no rights, a stale mount, an interruption.
void refuse_own_trouble(const Error& error) {
  const ErrorCode code = error.info().code;
  const bool of_file = code == ErrorCode::kCorrupt || code == ErrorCode::kIncomplete ||
                       code == ErrorCode::kHostile || code == ErrorCode::kUnsupported ||
                       code == ErrorCode::kLimit || code == ErrorCode::kMismatch ||
                       code == ErrorCode::kNotFound;
  const std::string& found = error.info().found;
  const bool no_file = found.ends_with(", EISDIR") || found.ends_with(", ELOOP");
  if (!of_file && !no_file && !checkpoint::is_bad_sector(error.info())) throw error;
}

bool is_storage(const ZipRecord& record) { return record.name.starts_with("data/"); }

// The same as read_torn_file() gives, of a file whose directory is whole.
TornFile torn_form(const TorchFile& file) {
  TornFile result{.prefix = file.zip().prefix, .pickle = {}, .storages = {}};
  for (const ZipRecord& record : file.zip().records) {
    if (record.name != "data.pkl") continue;
    result.pickle.resize(static_cast<size_t>(record.size_bytes));
    file.file().read_at(record.data_offset, std::as_writable_bytes(std::span(result.pickle)));
  }
  for (int64_t bytes : checkpoint::storage_sizes(result.pickle, file.path()))
    result.storages.push_back({bytes, std::nullopt, ""});
  for (const ZipRecord& record : file.zip().records) {
    if (is_storage(record))
      result.storages.at(static_cast<size_t>(std::stol(record.name.substr(5)))).record = record;
  }
  return result;
}

}  // namespace

const char* name(Health health) {
  switch (health) {
    case Health::kWhole:
      return "whole";
    case Health::kDamaged:
      return "damaged";
    case Health::kTorn:
      return "torn";
    case Health::kLost:
      return "lost";
    case Health::kHostile:
      return "hostile";
    case Health::kMissing:
      break;
  }
  return "missing";
}

void SurveyedFile::give_up(const ErrorInfo& reason) {
  health = reason.code == ErrorCode::kHostile ? Health::kHostile : Health::kLost;
  why = one_line(reason);
  torch.reset();
}

Survey::Survey(Storage& storage, const checkpoint::SourcePlace& place,
               const checkpoint::ReadOptions& options)
    : base_(storage),
      folder_(place.folder),
      options_(options),
      shown_(storage, folder_),
      universal_(place.kind == checkpoint::SourcePlace::Kind::kUniversal) {
  options_.prove = false;
  options_.tag.clear();
  options_.lost_experts = universal_;
  if (universal_)
    survey_universal();
  else
    survey_zero();
}

void Survey::survey_zero() {
  const Inventory inventory = checkpoint::take_inventory(base_, folder_);
  layers_ = !inventory.layers.empty();
  experts_ = !inventory.experts.empty() || !inventory.expert_optim.empty();
  std::vector<std::string> names = inventory.layers;
  names.insert(names.end(), inventory.experts.begin(), inventory.experts.end());
  for (const auto& [rank, file] : inventory.expert_optim) names.push_back(file);
  for (const auto& [mp, model] : inventory.model) names.push_back(model);
  for (const auto* ranks : {&inventory.model_of_rank, &inventory.optim}) {
    for (const auto& [mp, by_rank] : *ranks) {
      for (const auto& [rank, file] : by_rank) names.push_back(file);
    }
  }
  look_at(names);
  expect_files(inventory);
  for (const SurveyedFile& each : files_) refuse_without_sibling(each);
  // Each pipeline stage has its own; tensor-parallel ranks have the same.
  std::set<int> named;
  for (const auto& [name, place] : places_) {
    const SurveyedFile& model = file(name);
    if (!place.optim && model.torch && named.insert(place.mp).second) name_optimized(model);
  }
  stand_in_for_lost();
}

void Survey::name_optimized(const SurveyedFile& model) {
  for (const checkpoint::NamedShapes& group : model_states_of(model).param_shapes) {
    for (const auto& [name, shape] : group) optimized_.insert(name);
  }
}

void Survey::look_at(const std::vector<std::string>& names) {
  std::vector<Look> looks(names.size());
  parallel_for(names.size(), options_.workers, [&](size_t i) { looks[i] = look(names[i]); });
  for (const Look& each : looks) add(each.file);
  for (Look& each : looks) put_together(&each);
}

const SurveyedFile* Survey::find(const std::string& name) const {
  const auto found = numbers_.find(name);
  return found == numbers_.end() ? nullptr : &files_[found->second];
}

void Survey::add(SurveyedFile file) {
  numbers_[file.name] = files_.size();
  files_.push_back(std::move(file));
}

Survey::Look Survey::look(const std::string& name) {
  Look result;
  result.file.name = name;
  try {
    look_into(&result, checkpoint::join(folder_, name));
  } catch (const Error& error) {
    refuse_own_trouble(error);
    result.file.give_up(error.info());
    result.torn.reset();
    result.file.damage.clear();
  }
  return result;
}

void Survey::look_into(Look* look, const std::string& path) {
  try {
    look->file.torch = std::make_shared<TorchFile>(base_, path, &shelf_);
    bool whole = true;
    for (const ZipRecord& record : look->file.torch->zip().records) {
      if (!is_storage(record) || record.size_bytes == 0) continue;
      const std::string why = why_unproven(look->file.torch->file(), record);
      if (why.empty()) continue;
      look->file.damage.push_back(
          {record.data_offset, record.data_offset + record.size_bytes, why});
      whole = whole && record.size_bytes > kNumberBytes;
    }
    if (!look->file.damage.empty()) {
      look->file.health = Health::kDamaged;
      look->file.why = look->file.damage[0].why;
    }
    if (!whole) look->torn = torn_form(*look->file.torch);
  } catch (const Error& error) {
    // A name in the directory that lies may be a flipped bit; a pickle that lies is told again.
    const ErrorCode code = error.info().code;
    if (code != ErrorCode::kCorrupt && code != ErrorCode::kIncomplete &&
        code != ErrorCode::kHostile && !checkpoint::is_bad_sector(error.info()))
      throw;
    look->file.torch.reset();
    look->file.damage.clear();
    look->file.health = Health::kTorn;
    look->file.why = one_line(error.info());
    look->bytes = base_.open_read(path);
    look->torn = checkpoint::read_torn_file(*look->bytes);
  }
  const std::string prefix = look->torn ? look->torn->prefix : look->file.torch->zip().prefix;
  const std::string own = checkpoint::base_name(look->file.name);
  const std::string stem = own.substr(0, own.rfind('.'));
  if (prefix != stem && prefix != "archive" && !options_.allow_renamed)
    throw Error(ErrorInfo{
        .code = ErrorCode::kMismatch,
        .what = "The file was saved under another name (--allow-renamed takes it as it is):",
        .file = path,
        .entry = quote(prefix)});
  if (look->torn && look->file.torch) check_records(look);  // a torn file's are proven by now
}

// Of a whole file that needs a stand-in: which of its records are proven.
void Survey::check_records(Look* look) {
  if (!look->bytes) look->bytes = base_.open_read(checkpoint::join(folder_, look->file.name));
  for (TornStorage& storage : look->torn->storages) {
    if (!storage.record || storage.size_bytes == 0) continue;
    storage.why = why_unproven(*look->bytes, *storage.record);
  }
}

void Survey::put_together(Look* look) {
  if (!look->torn) return;
  SurveyedFile& own = file(look->file.name);
  std::vector<StorageSource> storages;
  std::map<int64_t, std::string> common;
  for (size_t key = 0; key < look->torn->storages.size(); ++key) {
    const TornStorage& from = look->torn->storages[key];
    StorageSource storage{.size_bytes = from.size_bytes,
                          .record = from.record ? &*from.record : nullptr,
                          .literal = {},
                          .why = from.why};
    if (!from.why.empty() && from.size_bytes <= kNumberBytes)
      storage.literal = borrowed_number(own.name, key, from.size_bytes);
    // At stage 0 each parameter has a step of its own, and no other file may have it.
    if (!from.why.empty() && from.size_bytes <= kNumberBytes && storage.literal.empty()) {
      const auto [known, fresh] = common.try_emplace(from.size_bytes);
      if (fresh) known->second = commonest(*look, from.size_bytes);
      storage.literal = known->second;
    }
    storages.push_back(std::move(storage));
  }
  auto pickle = std::make_shared<const std::string>(std::move(look->torn->pickle));
  StandIn made = make_stand_in(own.name, std::move(pickle), storages, look->bytes);
  own.damage = std::move(made.damage);
  try {
    show(&own, std::move(made));
  } catch (const Error& error) {
    if (held_bytes_ > kMostHeldBytes) throw;
    refuse_own_trouble(error);
    own.give_up(error.info());
  }
}

void Survey::expect(const std::string& name, Place place) {
  places_[name] = place;
  require(name);
}

void Survey::require(const std::string& name) {
  if (find(name) != nullptr) return;
  if (++missing_ > kMostMissing)
    throw Error(ErrorInfo{.code = ErrorCode::kLimit,
                          .what = "More files are missing than any checkpoint has.",
                          .file = folder_,
                          .expected = "at most " + std::to_string(kMostMissing),
                          .next = kNext});
  SurveyedFile missing{.name = name, .health = Health::kMissing, .damage = {}, .torch = nullptr};
  missing.why = "the file is missing";
  add(std::move(missing));
}

// Which files there must be, as the first model file with a header says.
void Survey::expect_files(const Inventory& inventory) {
  const SurveyedFile* first = nullptr;
  std::string reasons;
  for (const SurveyedFile& each : files_) {
    const FileName::Kind kind = checkpoint::parse_file_name(each.name).kind;
    if (kind != FileName::Kind::kModel && kind != FileName::Kind::kModelOfRank) continue;
    if (each.torch && !first) first = &each;
    if (!each.torch && reasons.size() < 500) reasons += quote(each.name) + ": " + each.why + " ";
  }
  if (first == nullptr)
    throw Error(ErrorInfo{.code = ErrorCode::kIncomplete,
                          .what = "No model file can be read; it has the names and shapes, without "
                                  "which partitions say nothing.",
                          .file = folder_,
                          .expected = "one with a whole header",
                          .found = reasons,
                          .next = "bring a model file of this very save; that of an earlier step "
                                  "is refused"});
  const ModelStates model = model_states_of(*first);
  const Fields fields(*first->torch);
  for (const char* key : {"folding", "ds_autoep_layers"})
    experts_ = experts_ || fields.maybe(fields.root(), key) != kNoNode;
  const auto counts = checkpoint::expert_counts(fields);
  experts_ = experts_ || (counts && !counts->empty());
  stage3_ = inventory.stage3();
  ranks_ = static_cast<int>(model.dp_world);
  const auto mp_ranks = static_cast<int>(
      std::max<int64_t>(model.mp_world, static_cast<int64_t>(inventory.mp_ranks())));
  std::string prefix;
  for (const auto& [mp, by_rank] : inventory.optim)
    prefix = checkpoint::parse_file_name(by_rank.begin()->second).prefix;
  for (int mp = 0; mp < mp_ranks; ++mp) {
    if (!stage3_) expect(checkpoint::model_file_name(mp), {false, mp, 0});
    for (int rank = 0; rank < ranks_; ++rank) {
      if (stage3_) expect(checkpoint::model_file_name_of_rank(rank, mp), {false, mp, rank});
      if (model.has_param_shapes)
        expect(checkpoint::optim_file_name(prefix, rank, mp), {true, mp, rank});
    }
  }
}

// What an expert, a layer or a stage of a pipeline holds, no other file of its kind tells. Where
// there are experts, ranks own different ones, so that their partitions are not laid out alike.
void Survey::refuse_without_sibling(const SurveyedFile& file) const {
  if (file.torch || (!experts_ && !layers_)) return;
  const auto place = places_.find(file.name);
  if (!experts_ && place != places_.end() && place->second.optim) return;
  throw Error(ErrorInfo{
      .code = ErrorCode::kIncomplete,
      .what =
          std::string("A file is lost whose header no other stands for: of a checkpoint with ") +
          (experts_ ? "experts every file's is needed."
                    : "pipeline stages those of models and layers are needed."),
      .file = checkpoint::join(folder_, file.name),
      .expected = "a header that can be read; payloads may be damaged",
      .found = file.why,
      .next = "bring that file from another copy of this very save"});
}

// A file with a header of the same kind: of the same mp rank if there is one. Gaps between aligned
// parameters are those of a pipeline stage's own parameters.
const SurveyedFile* Survey::sibling_of(const Place& place) const {
  const auto aligned = [](const SurveyedFile& file) {
    const Fields fields(*file.torch);
    const auto optimizer = fields.maybe(fields.root(), "optimizer_state_dict");
    return optimizer != kNoNode && fields.maybe(optimizer, "param_alignment_paddings") != kNoNode;
  };
  const SurveyedFile* other = nullptr;
  for (const auto& [name, there] : places_) {
    const SurveyedFile* candidate = find(name);
    if (there.optim != place.optim || !candidate->has_header() || !candidate->torch) continue;
    if (there.mp == place.mp) return candidate;
    if (other == nullptr && !(layers_ && aligned(*candidate))) other = candidate;
  }
  return other;
}

ModelStates Survey::model_states_of(const SurveyedFile& file) const {
  checkpoint::ShardedState only;
  only.folder = folder_;
  only.files.push_back({file.torch->path(), file.name, file.torch, nullptr});
  return checkpoint::read_model_states(only, 0);
}

const ModelStates& Survey::model_of(int mp) {
  if (const auto known = models_.find(mp); known != models_.end()) return known->second;
  for (const auto& [name, place] : places_) {
    const SurveyedFile* model = find(name);
    if (place.optim || place.mp != mp || !model->torch) continue;
    return models_[mp] = model_states_of(*model);
  }
  throw Error(ErrorCode::kIncomplete, "No model file of a model-parallel rank can be read.");
}

// Models first: partitions are laid out by their shapes.
void Survey::stand_in_for_lost() {
  const bool any_optim = std::ranges::any_of(places_, [&](const auto& each) {
    return each.second.optim && find(each.first)->has_header();
  });
  const bool wants_optim =
      std::ranges::any_of(places_, [](const auto& each) { return each.second.optim; });
  if (wants_optim && !any_optim && stage3_)
    throw Error(ErrorInfo{.code = ErrorCode::kIncomplete,
                          .what = "No optimizer file can be read: at stage 3 they alone hold the "
                                  "weights.",
                          .file = folder_,
                          .expected = "one with a whole header",
                          .next = "bring one from another copy"});
  options_.model_files_only = wants_optim && !any_optim;
  for (const bool optim : {false, true}) {
    for (const auto& [name, place] : places_) {
      if (place.optim == optim && !file(name).torch && !(optim && !any_optim))
        replace(&file(name), place);
    }
  }
}

void Survey::replace(SurveyedFile* file, const Place& place) {
  const SurveyedFile* sibling = sibling_of(place);
  if (sibling == nullptr)
    throw Error(ErrorInfo{.code = ErrorCode::kIncomplete,
                          .what = "No file of its kind is left to say what a lost file held.",
                          .file = checkpoint::join(folder_, file->name),
                          .found = file->why,
                          .next = kNext});
  StandIn made = place.optim && !stage3_
                     ? partition_stand_in(file->name, *sibling->torch, model_of(place.mp),
                                          {.rank = place.rank, .ranks = ranks_}, file->why)
                     : sibling_stand_in(file->name, form_of(*sibling), file->why);
  file->damage = {{0, made.contents->size_bytes, file->why}};
  show(file, std::move(made));
}

const SiblingForm& Survey::form_of(const SurveyedFile& sibling) {
  const auto known = forms_.find(sibling.torch.get());
  if (known != forms_.end()) return known->second;
  return forms_.emplace(sibling.torch.get(), sibling_form(sibling.torch)).first->second;
}

// Puts the stand-in in the file's place. A few bytes of a model file can ask for any number.
void Survey::show(SurveyedFile* file, StandIn made) {
  held_bytes_ += made.held_bytes;
  for (const Pieces::Piece& piece : made.contents->pieces) {
    if (piece.shared && counted_.insert(piece.shared.get()).second)
      held_bytes_ += static_cast<int64_t>(piece.shared->size());
  }
  refuse_too_much();
  shown_.put(file->name, std::move(made.contents));
  file->torch = std::make_shared<TorchFile>(shown_, checkpoint::join(folder_, file->name), &shelf_);
  if (counted_.insert(&file->torch->document()).second)
    held_bytes_ += file->torch->pickle().memory_bytes();
  refuse_too_much();
}

void Survey::refuse_too_much() const {
  if (held_bytes_ <= kMostHeldBytes) return;
  throw Error(ErrorInfo{.code = ErrorCode::kLimit,
                        .what = "A limit against resource bombs was reached: memory of what stands "
                                "in for damaged and missing files.",
                        .file = folder_,
                        .expected = "at most " + std::to_string(kMostHeldBytes) + " bytes",
                        .found = std::to_string(held_bytes_) + " bytes or more",
                        .next = kNext});
}

// Of an uneven split a rank's shapes are its own: another rank's header then fits nowhere.
void Survey::refuse_borrowed_shapes(const ErrorInfo& info) const {
  if (info.code != ErrorCode::kCorrupt && info.code != ErrorCode::kMismatch) return;
  for (const auto& [name, place] : places_) {
    const SurveyedFile* model = find(name);
    if (place.optim || stage3_ || model->has_header()) continue;
    throw Error(ErrorInfo{.code = ErrorCode::kIncomplete,
                          .what =
                              "The model file of a tensor-parallel rank is lost, and its shapes "
                              "are not those of another rank.",
                          .file = model->torch->path(),
                          .found = model->why + "; with another rank's shapes: " + one_line(info),
                          .next = "bring that file from another copy"});
  }
}

checkpoint::ShardedState Survey::read() {
  for (;;) {
    try {
      checkpoint::ShardedState state = checkpoint::read_checkpoint(shown_, folder_, options_);
      if (!universal_ || !add_lacking(state)) return state;
    } catch (const Error& error) {
      const ErrorInfo& info = error.info();
      if (universal_ && lose_state(info)) continue;
      const std::string name = checkpoint::base_name(info.file);
      const auto place = places_.find(name);
      const bool own = info.code == ErrorCode::kCorrupt || info.code == ErrorCode::kHostile;
      refuse_borrowed_shapes(info);
      if (!own || place == places_.end() || !find(name)->has_header()) throw;
      SurveyedFile& wrong = file(name);
      wrong.give_up(info);
      refuse_without_sibling(wrong);
      replace(&wrong, place->second);
    }
  }
}

}  // namespace isoshard::reshard
