// See survey.h: a universal folder, a file a state of a parameter under zero/.
#include "checkpoint/deepspeed/fields.h"
#include "checkpoint/deepspeed/names.h"
#include "checkpoint/deepspeed/universal_states.h"
#include "core/error.h"
#include "reshard/survey.h"

namespace isoshard::reshard {

using checkpoint::Fields;
using checkpoint::FileName;
using checkpoint::parent_folder;

namespace {

constexpr const char* kWeight = "fp32.pt";

bool is_state(const std::string& name) { return parent_folder(parent_folder(name)) != "."; }

// Tensors are {…, param: tensor}, or at stage 3 bare and flat; all else is a number.
bool holds_tensor(const SurveyedFile& file) {
  const Fields fields(*file.torch);
  const auto bare = file.torch->tensor(fields.root());
  return fields.pickle().is_mapping(fields.root()) || (bare && bare->shape.size() == 1);
}

}  // namespace

void Survey::survey_universal() {
  std::vector<std::string> names;
  for (const DirectoryEntry& entry : base_.list(folder_)) {
    const FileName::Kind kind = checkpoint::parse_file_name(entry.name).kind;
    if (kind == FileName::Kind::kModel || kind == FileName::Kind::kModelOfRank)
      names.push_back(entry.name);
  }
  const std::string global = "zero/optimizer_state.pt";
  if (base_.is_file(checkpoint::join(folder_, global))) names.push_back(global);
  const auto states = checkpoint::universal_state_files(base_, folder_);
  names.insert(names.end(), states.begin(), states.end());
  look_at(names);
  for (const SurveyedFile& each : files_) {
    if (!is_state(each.name) && each.name != global && each.torch) {
      name_optimized(each);
      break;
    }
  }
  expect_listed();
  for (const std::string& state : states) require(checkpoint::join(parent_folder(state), kWeight));
  for (size_t i = 0; i < files_.size(); ++i) {
    if (!files_[i].torch) stand_in_for_state(&files_[i]);
  }
}

// A tensor's header is that of another state of the parameter, a number's that of another's.
void Survey::stand_in_for_state(SurveyedFile* lost) {
  const auto of = [&](size_t number) -> const SurveyedFile* {
    const SurveyedFile& other = files_[number];
    return other.has_header() && other.torch && is_state(other.name) ? &other : nullptr;
  };
  const std::string folder = parent_folder(lost->name), own = checkpoint::base_name(lost->name);
  const SurveyedFile* brother = nullptr;
  const std::string inside = checkpoint::join(folder, "");
  for (auto at = numbers_.lower_bound(inside);
       !brother && at != numbers_.end() && at->first.starts_with(inside); ++at) {
    const SurveyedFile* other = of(at->second);
    if (other && parent_folder(other->name) == folder && holds_tensor(*other)) brother = other;
  }
  if (!namesakes_.contains(own)) {
    for (size_t i = 0; i < files_.size(); ++i) {
      if (checkpoint::base_name(files_[i].name) != own || !of(i)) continue;
      namesakes_[own] = i;
      break;
    }
  }
  const SurveyedFile* namesake = namesakes_.contains(own) ? &files_[namesakes_[own]] : nullptr;
  const bool number = namesake && own != kWeight && !holds_tensor(*namesake);
  const SurveyedFile* sibling = number ? namesake : brother;
  if (!is_state(lost->name) || sibling == nullptr)
    throw Error(
        ErrorInfo{.code = ErrorCode::kIncomplete,
                  .what = "A file of a universal folder is lost, and no other has its form.",
                  .file = checkpoint::join(folder_, lost->name),
                  .expected = "a header that can be read; payloads may be damaged",
                  .found = lost->why,
                  .next = "bring it from where the folder was written; model files are "
                          "byte copies of the source checkpoint's"});
  StandIn made = sibling_stand_in(lost->name, form_of(*sibling), lost->why);
  lost->damage = {{0, made.contents->size_bytes, lost->why}};
  show(lost, std::move(made));
}

// What isoshard wrote and listed, and is no longer there.
void Survey::expect_listed() {
  const auto listed = checkpoint::listed_files(base_, folder_);
  if (!listed) return;
  for (const std::string& path : *listed) {
    if (path.starts_with("zero/") && path.ends_with(".pt") && is_state(path)) require(path);
  }
}

// Whether the error is of one state's file, whose place a stand-in then takes.
bool Survey::lose_state(const ErrorInfo& info) {
  if (info.code != ErrorCode::kCorrupt && info.code != ErrorCode::kHostile) return false;
  const std::string inside = checkpoint::join(folder_, "");
  if (!info.file.starts_with(inside)) return false;
  const std::string name = info.file.substr(inside.size());
  if (!numbers_.contains(name) || !is_state(name) || !file(name).has_header()) return false;
  SurveyedFile& wrong = file(name);
  wrong.give_up(info);
  namesakes_.clear();
  stand_in_for_state(&wrong);
  return true;
}

// Whether there is a state more, as another with the same settings has.
bool Survey::add_lacking(const checkpoint::ShardedState& state) {
  bool added = false;
  for (const checkpoint::LackingState& each : checkpoint::lacking_universal_states(state, shown_)) {
    if (find(each.file) != nullptr) continue;
    require(each.file);
    stand_in_for_state(&file(each.file));
    added = true;
  }
  return added;
}

}  // namespace isoshard::reshard
