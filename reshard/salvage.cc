// See salvage.h: what is good, and what is not, tensor by tensor.
#include "reshard/salvage.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <tuple>

#include "checkpoint/deepspeed/fields.h"
#include "checkpoint/deepspeed/source.h"
#include "checkpoint/manifest.h"
#include "core/check.h"
#include "core/error.h"
#include "core/utf8.h"
#include "reshard/copies.h"

namespace isoshard::reshard {

using checkpoint::Leaf;
using checkpoint::ParameterState;
using checkpoint::ShardedState;
using Status = SalvagedTensor::Status;

namespace {

// Lost elements are shown as NaN where the dtype has one.
bool can_be_nan(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat64 || dtype == DType::kFloat16 ||
         dtype == DType::kBFloat16;
}

class Stock {
 public:
  Stock(const Survey& survey, Salvage* salvage, bool partial)
      : survey_(survey), salvage_(*salvage), state_(salvage->state), partial_(partial) {
    for (const checkpoint::SourceFile& file : state_.files) {
      files_.push_back(survey_.find(file.relative));
      CHECK(files_.back() != nullptr, "a file was read that was not surveyed");
    }
  }

  void run() {
    for (size_t i = 0; i < state_.parameters.size(); ++i) add_weight(static_cast<int>(i));
    for (size_t i = 0; i < state_.parameters.size(); ++i) {
      for (int leaf : state_.parameters[i].states) add_state(static_cast<int>(i), leaf);
    }
    for (checkpoint::BufferState& buffer : state_.buffers) add_buffer(&buffer);
    add_numbers();
    compare();
  }

 private:
  const Damage* damage_at(int file, int64_t begin, int64_t end) const;
  std::vector<LostRange> lost_of(const Leaf& leaf) const;
  bool whole(int leaf) const { return lost_of(state_.leaf(leaf)).empty(); }
  SalvagedTensor judge(const std::string& name, const std::string& state, int leaf) const;
  bool take_replica(SalvagedTensor* tensor, int leaf);
  void add(SalvagedTensor tensor, const std::string& folder);
  void lose_unknown_tie(SalvagedTensor* tensor) const;
  void add_weight(int parameter);
  void add_state(int parameter, int leaf);
  void add_buffer(checkpoint::BufferState* buffer);
  int buffer_of_other_rank(const checkpoint::BufferState& buffer, std::string* from);
  bool take_copy(SalvagedTensor* tensor, const ParameterState& parameter);
  void add_numbers();
  void compare();

  const Survey& survey_;
  Salvage& salvage_;
  ShardedState& state_;
  bool partial_;
  std::vector<const SurveyedFile*> files_;  // by number in the state
};

const Damage* Stock::damage_at(int file, int64_t begin, int64_t end) const {
  const SurveyedFile* of = files_[static_cast<size_t>(file)];
  for (const Damage& damage : of->damage) {
    if (damage.begin < end && begin < damage.end) return &damage;
  }
  return nullptr;
}

std::vector<LostRange> Stock::lost_of(const Leaf& leaf) const {
  std::vector<LostRange> result;
  const int64_t item = item_size_bytes(leaf.dtype);
  for (const checkpoint::FileFragment& f : leaf.fragments) {
    const Damage* damage = damage_at(f.file, f.offset_bytes, f.offset_bytes + f.count * item);
    if (damage == nullptr) continue;
    const std::string& file = files_[static_cast<size_t>(f.file)]->name;
    if (!result.empty() && result.back().begin + result.back().count == f.begin &&
        result.back().file == file && result.back().why == damage->why)
      result.back().count += f.count;
    else
      result.push_back({f.begin, f.count, file, damage->why});
  }
  return result;
}

SalvagedTensor Stock::judge(const std::string& name, const std::string& state, int number) const {
  const Leaf& leaf = state_.leaf(number);
  SalvagedTensor tensor{.name = name,
                        .state = state,
                        .kind = {},
                        .shape = leaf.shape,
                        .dtype = leaf.dtype,
                        .in = {},
                        .from = {},
                        .partial_in = {},
                        .lost = lost_of(leaf),
                        .kept = {}};
  if (tensor.lost.empty()) {
    tensor.leaf = number;
    return tensor;
  }
  int64_t at = 0;
  const auto keep = [&](int64_t end) {
    if (at < end) tensor.kept.emplace_back(at, end - at);
  };
  for (const LostRange& range : tensor.lost) {
    keep(range.begin);
    at = range.begin + range.count;
  }
  keep(leaf.size_elements());
  tensor.status = tensor.kept.empty() ? Status::kLost : Status::kPartial;
  if (tensor.status == Status::kPartial && partial_ && can_be_nan(leaf.dtype))
    tensor.partial_leaf = number;
  return tensor;
}

// What ranks of another axis hold alike: a whole one takes the place of one that is not.
bool Stock::take_replica(SalvagedTensor* tensor, int leaf) {
  for (const auto& [first, second] : state_.replicas) {
    if (first != leaf || state_.leaf(second).shape != tensor->shape || !whole(second)) continue;
    tensor->status = Status::kExported;
    tensor->leaf = second;
    tensor->from = "the replica of " + state_.leaf(second).state;
    return true;
  }
  return false;
}

void Stock::add(SalvagedTensor tensor, const std::string& folder) {
  if (tensor.status == Status::kExported) tensor.in = folder;
  if (tensor.status == Status::kCopy) tensor.in = "copies";
  if (tensor.status != Status::kExported && tensor.partial_leaf >= 0)
    tensor.partial_in = "partial/" + folder;
  salvage_.tensors.push_back(std::move(tensor));
}

// The copy that the model computes with, or that of a tied name.
bool Stock::take_copy(SalvagedTensor* tensor, const ParameterState& parameter) {
  std::vector<std::pair<int, std::string>> candidates = {{parameter.model_copy, ""}};
  for (const checkpoint::Alias& alias : state_.aliases) {
    if (alias.target == parameter.name)
      candidates.emplace_back(alias.model_copy, ", under the tied name " + quote(alias.name));
  }
  for (const auto& [leaf, where] : candidates) {
    if (leaf < 0) continue;
    SalvagedTensor copy = judge(tensor->name, tensor->state, leaf);
    if (copy.status != Status::kExported && !take_replica(&copy, leaf)) continue;
    if (copy.shape != tensor->shape) continue;
    tensor->status = Status::kCopy;
    tensor->leaf = copy.leaf;
    tensor->dtype = copy.dtype;
    tensor->from = "the model's copy in " + std::string(name(copy.dtype)) + where +
                   (copy.from.empty() ? "" : ", " + copy.from);
    return true;
  }
  return false;
}

// Stage 3: only rank 0's model file says which names are tied. Without it such a name looks like a
// parameter without elements, and nothing may stand for it.
void Stock::lose_unknown_tie(SalvagedTensor* tensor) const {
  const SurveyedFile* first = files_[static_cast<size_t>(state_.model_files[0])];
  const bool empty = numel(tensor->shape) == 0 &&
                     state_.parameters[static_cast<size_t>(tensor->parameter)].group < 0;
  if (state_.flavour != checkpoint::Flavour::kZero3 || !empty || first->has_header()) return;
  tensor->status = Status::kLost;
  tensor->leaf = -1;
  tensor->lost = {{0, 0, first->name,
                   first->why + "; the others do not say which name this one is tied to, or "
                                "whether it has no elements"}};
}

void Stock::add_weight(int number) {
  const ParameterState& parameter = state_.parameters[static_cast<size_t>(number)];
  SalvagedTensor tensor = judge(parameter.name, "weight", parameter.weight);
  tensor.parameter = number;
  const bool optimized = parameter.group >= 0 || survey_.optimized().contains(parameter.name);
  const bool master =
      optimized && !salvage_.model_files_only && state_.leaf(parameter.weight).state != "param";
  tensor.kind = master ? "master" : optimized ? "model" : "frozen";
  lose_unknown_tie(&tensor);
  if (tensor.status != Status::kExported && !take_replica(&tensor, parameter.weight))
    take_copy(&tensor, parameter);
  if (salvage_.model_files_only && tensor.status == Status::kExported &&
      survey_.optimized().contains(tensor.name)) {
    tensor.status = Status::kCopy;
    tensor.from = "the model's copy in " + std::string(name(tensor.dtype)) +
                  ": no optimizer file can be read";
  }
  add(std::move(tensor), "weights");
}

void Stock::add_state(int parameter, int leaf) {
  const ParameterState& of = state_.parameters[static_cast<size_t>(parameter)];
  SalvagedTensor tensor = judge(of.name, state_.leaf(leaf).state, leaf);
  tensor.parameter = parameter;
  if (tensor.status != Status::kExported) take_replica(&tensor, leaf);
  const std::string folder = tensor.state;
  static const std::set<std::string> taken = {
      "weights", "copies",       "partial",          "weight",
      "buffer",  "salvage.json", "certificate.json", checkpoint::kManifestName};
  if (taken.contains(folder) || folder.find('/') != std::string::npos ||
      !why_unsafe_name(folder).empty())
    state_.refuse(ErrorCode::kUnsupported, "A state's name cannot be that of a folder here.",
                  quote(of.name), "a name such as exp_avg", quote(folder),
                  "docs/KNOWN_GAPS.md says what salvage leaves out");
  add(std::move(tensor), folder);
}

void Stock::add_buffer(checkpoint::BufferState* buffer) {
  SalvagedTensor tensor = judge(buffer->name, "buffer", buffer->leaf);
  if (tensor.status != Status::kExported && !take_replica(&tensor, buffer->leaf)) {
    std::string from;
    if (const int leaf = buffer_of_other_rank(*buffer, &from); leaf >= 0) {
      tensor.status = Status::kExported;
      tensor.leaf = leaf;
      tensor.from = from;
    }
  }
  add(std::move(tensor), "weights");
}

// Stage 3: every rank's model file holds the buffers; rank 0's are the ones that count.
int Stock::buffer_of_other_rank(const checkpoint::BufferState& buffer, std::string* from) {
  if (state_.flavour != checkpoint::Flavour::kZero3 || state_.topology.tensor > 1) return -1;
  for (int file : state_.model_files) {
    const SurveyedFile* of = files_[static_cast<size_t>(file)];
    if (!of->has_header() || !of->torch) continue;
    const checkpoint::Fields fields(*of->torch);
    const checkpoint::NodeId module = fields.maybe(fields.root(), "module");
    const checkpoint::NodeId node =
        module == checkpoint::kNoNode ? module : fields.maybe(module, buffer.name);
    if (node == checkpoint::kNoNode) continue;
    Leaf leaf = checkpoint::file_leaf(*of->torch, file, fields.tensor(node, buffer.name),
                                      buffer.name, "buffer");
    if (leaf.shape != state_.leaf(buffer.leaf).shape || !lost_of(leaf).empty()) continue;
    *from = "another rank's copy, in " + of->name;
    return state_.add_leaf(std::move(leaf));
  }
  return -1;
}

// Once where parameters of a group have the same number, and again where one is not proven.
void Stock::add_numbers() {
  std::set<std::tuple<int, std::string, int, checkpoint::NodeId>> read;
  std::set<std::tuple<int, std::string, std::string, bool>> told;
  for (const ParameterState& parameter : state_.parameters) {
    for (const checkpoint::Scalar& scalar : parameter.scalars) {
      const auto [file, node] = scalar.value;
      if (!read.insert({parameter.group, scalar.name, file, node}).second) continue;
      SalvagedNumber number{scalar.name, checkpoint::scalar_text(state_, scalar.value),
                            parameter.group};
      const checkpoint::TorchFile& document = state_.document(file);
      const auto view = document.tensor(node);
      if (!files_[static_cast<size_t>(file)]->has_header()) number.proven = false;
      if (view && damage_at(file, document.data_offset(*view),
                            document.data_offset(*view) + item_size_bytes(view->dtype)))
        number.proven = false;
      if (told.insert({number.group, number.name, number.value, number.proven}).second)
        salvage_.numbers.push_back(std::move(number));
    }
  }
}

// Good tensors and their copies, where both are there.
void Stock::compare() {
  std::vector<std::string> orphans;
  std::vector<CopyPair> pairs = copy_pairs(state_, &orphans);
  std::erase_if(pairs, [&](const CopyPair& p) { return !whole(p.original) || !whole(p.copy); });
  for (const CopyDifference& d : compare_copies(state_, pairs, 2).differences) {
    salvage_.disagreements.push_back(
        quote(d.pair.name) + ": " + std::to_string(d.differing) + " of " + std::to_string(d.total) +
        " elements differ between what is stored twice, first at " + d.index + ": " + d.original +
        " gives " + d.expected + ", the copy is " + d.found);
  }
}

void refuse_form(const checkpoint::SourcePlace& place) {
  if (place.kind != checkpoint::SourcePlace::Kind::kWeights) return;
  throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                        .what = "Files of weights are not salvaged yet.",
                        .file = place.folder,
                        .expected = "a save folder, tag folder or universal folder",
                        .next = "docs/KNOWN_GAPS.md says what salvage leaves out"});
}

}  // namespace

const char* name(Status status) {
  switch (status) {
    case Status::kExported:
      return "exported";
    case Status::kCopy:
      return "copy";
    case Status::kPartial:
      return "partial";
    case Status::kLost:
      break;
  }
  return "lost";
}

int64_t Salvage::count(Status status) const {
  return std::ranges::count(tensors, status, &SalvagedTensor::status);
}

bool Salvage::complete() const {
  return count(Status::kExported) == static_cast<int64_t>(tensors.size()) &&
         std::ranges::all_of(numbers, &SalvagedNumber::proven) && disagreements.empty();
}

Salvage take_stock(Storage& storage, const std::string& source,
                   const checkpoint::ReadOptions& options, bool partial) {
  checkpoint::require_source(storage, source, options.tag);
  const checkpoint::SourcePlace place = checkpoint::resolve_source(storage, source, options.tag);
  refuse_form(place);
  Survey survey(storage, place, options);
  Salvage salvage;
  salvage.state = survey.read();
  salvage.model_files_only = survey.model_files_only();
  Stock(survey, &salvage, partial).run();
  salvage.files = survey.files();
  std::ranges::sort(salvage.files, {}, &SurveyedFile::name);
  return salvage;
}

}  // namespace isoshard::reshard
