// See salvage.h: the tensors as blueprints, the report, and the folder that holds both.
#include <algorithm>
#include <cstring>
#include <limits>
#include <map>

#include "checkpoint/deepspeed/weights_blueprint.h"
#include "checkpoint/format/crc.h"
#include "checkpoint/manifest.h"
#include "checkpoint/publication.h"
#include "checkpoint/small_file.h"
#include "core/cast.h"
#include "core/check.h"
#include "core/error.h"
#include "reshard/manifest_check.h"
#include "reshard/plan.h"
#include "reshard/salvage.h"

namespace isoshard::reshard {

using checkpoint::FileBlueprint;
using checkpoint::Leaf;
using checkpoint::ParameterState;
using checkpoint::ShardedState;
using nlohmann::json;
using Status = SalvagedTensor::Status;

namespace {

constexpr size_t kMostRanges = 1000;  // of one tensor in the report

// Quiet NaN of one dtype, over and over: what stands in place of lost elements.
class NanFile : public ReadableFile {
 public:
  NanFile(DType dtype, int64_t size_bytes) : path_("lost elements"), size_bytes_(size_bytes) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    pattern_.resize(static_cast<size_t>(item_size_bytes(dtype)));
    if (dtype == DType::kFloat64) {
      const double wide = std::numeric_limits<double>::quiet_NaN();
      std::memcpy(pattern_.data(), &wide, sizeof wide);
    } else {
      cast(DType::kFloat32, std::as_bytes(std::span(&nan, 1)), dtype, pattern_);
    }
  }
  const std::string& path() const override { return path_; }
  int64_t size_bytes() const override { return size_bytes_; }
  void read_at(int64_t offset, std::span<std::byte> target) const override {
    for (size_t i = 0; i < target.size(); ++i)
      target[i] = pattern_[(static_cast<size_t>(offset) + i) % pattern_.size()];
  }
  int64_t next_data(int64_t offset) const override { return std::min(offset, size_bytes_); }
  int64_t next_hole(int64_t) const override { return size_bytes_; }

 private:
  std::string path_;
  int64_t size_bytes_;
  std::vector<std::byte> pattern_;
};

// The leaf with its lost elements taken from a file of NaN, of which there is one a dtype.
class NanFill {
 public:
  explicit NanFill(ShardedState* state) : state_(*state) {
    for (const Leaf& leaf : state_.leaves) most_ = std::max(most_, leaf.size_elements());
  }

  void fill(const SalvagedTensor& tensor) {
    Leaf& leaf = state_.leaf(tensor.partial_leaf);
    std::vector<checkpoint::FileFragment> fragments;
    for (const checkpoint::FileFragment& f : leaf.fragments) {
      const auto range = std::ranges::upper_bound(tensor.lost, f.begin, {}, &LostRange::begin);
      const bool lost = range != tensor.lost.begin() &&
                        f.begin < std::prev(range)->begin + std::prev(range)->count;
      fragments.push_back(lost ? checkpoint::FileFragment{f.begin, f.count, file_of(leaf.dtype), 0}
                               : f);
    }
    leaf.fragments = std::move(fragments);
  }

 private:
  int file_of(DType dtype) {
    const auto [known, fresh] = files_.emplace(dtype, static_cast<int>(state_.files.size()));
    if (fresh)
      state_.files.push_back({"lost elements", "lost elements", nullptr,
                              std::make_shared<NanFile>(dtype, most_ * item_size_bytes(dtype)),
                              false});
    return known->second;
  }

  ShardedState& state_;
  int64_t most_ = 0;
  std::map<DType, int> files_;
};

// A state of weights alone, made of some leaves under the names of parameters and buffers.
class Selection {
 public:
  explicit Selection(const ShardedState& whole) {
    state_.flavour = checkpoint::Flavour::kWeights;
    for (const Leaf& leaf : whole.leaves)
      state_.leaves.push_back({.name = leaf.name,
                               .state = leaf.state,
                               .dtype = leaf.dtype,
                               .shape = leaf.shape,
                               .fragments = {}});
  }

  void clear() {
    parameters_.clear();
    state_.buffers.clear();
    state_.aliases.clear();
    state_.groups.clear();
  }
  void add(const SalvagedTensor& tensor, int leaf) {
    if (tensor.state == "buffer") {
      state_.buffers.push_back({tensor.name, leaf});
      return;
    }
    ParameterState parameter{
        .name = tensor.name, .shape = tensor.shape, .states = {}, .scalars = {}};
    parameter.weight = leaf;
    parameter.model_dtype = state_.leaf(leaf).dtype;
    parameters_.push_back(std::move(parameter));
  }
  void add_aliases(const std::vector<checkpoint::Alias>& aliases) {
    for (const checkpoint::Alias& alias : aliases)
      state_.aliases.push_back({alias.name, alias.target, -1});
  }
  bool empty() const { return parameters_.empty() && state_.buffers.empty(); }
  std::vector<FileBlueprint> files(const std::string& folder, bool as_stored,
                                   int64_t max_shard_bytes) {
    state_.set_parameters(parameters_);
    checkpoint::TargetFiles made = checkpoint::weights_blueprints(
        state_, {.max_shard_bytes = max_shard_bytes, .model_dtype = as_stored});
    for (FileBlueprint& file : made.files) file.path = folder + "/" + file.path;
    return std::move(made.files);
  }

 private:
  ShardedState state_;
  std::vector<ParameterState> parameters_;
};

void add_ranges(const SalvagedTensor& tensor, json* object) {
  json lost = json::array(), kept = json::array();
  for (size_t i = 0; i < std::min(tensor.lost.size(), kMostRanges); ++i) {
    const LostRange& range = tensor.lost[i];
    lost.push_back(
        {{"begin", range.begin}, {"count", range.count}, {"file", range.file}, {"why", range.why}});
  }
  for (size_t i = 0; i < std::min(tensor.kept.size(), kMostRanges); ++i)
    kept.push_back({{"begin", tensor.kept[i].first}, {"count", tensor.kept[i].second}});
  (*object)["lost"] = lost;
  (*object)["kept"] = kept;
  const size_t most = std::max(tensor.lost.size(), tensor.kept.size());
  if (most > kMostRanges) (*object)["ranges_left_out"] = most - kMostRanges;
}

json tensor_json(const SalvagedTensor& tensor) {
  json object = {{"name", tensor.name},
                 {"state", tensor.state},
                 {"shape", tensor.shape},
                 {"dtype", name(tensor.dtype)},
                 {"status", name(tensor.status)}};
  if (!tensor.kind.empty()) object["kind"] = tensor.kind;
  if (!tensor.in.empty()) object["in"] = tensor.in;
  if (!tensor.partial_in.empty()) object["partial_in"] = tensor.partial_in;
  if (!tensor.from.empty()) object["from"] = tensor.from;
  if (!tensor.lost.empty()) {
    object["reason"] = tensor.lost[0].file + ": " + tensor.lost[0].why;
    add_ranges(tensor, &object);
  }
  return object;
}

json file_json(const SurveyedFile& file) {
  json object = {{"name", file.name}, {"health", name(file.health)}};
  if (!file.why.empty()) object["why"] = file.why;
  if (!file.has_header()) return object;
  for (const Damage& damage : file.damage) object["records"].push_back(damage.why);
  return object;
}

// What stands on the disk now is what was handed to write.
void read_back(Storage& storage, const std::string& folder, const FileHash& hash) {
  const std::string why = why_file_differs(storage, folder, manifest_file(hash));
  if (why.empty()) return;
  throw Error(ErrorInfo{
      .code = ErrorCode::kMismatch,
      .what = "A file reads back differently from what was written.",
      .file = hash.path,
      .expected = std::to_string(hash.size_bytes) + " bytes as written",
      .found = why,
      .safe = "nothing was published; the source was only read",
      .next = "check memory and disk of this machine, then run again; report it if it repeats"});
}

json certificate_of(const Salvage& salvage, const SalvageOptions& options) {
  const json report = salvage_report(salvage, options.program);
  json certificate = {{"schema", 1},
                      {"kind", "isoshard-certificate"},
                      {"program", options.program},
                      {"source", report["source"]},
                      {"target", {{"format", "salvage, safetensors"}}},
                      {"verify", "reread"},
                      {"lossy", json::array()},
                      {"inferred", json::array()},
                      {"synthesised", json::array()},
                      {"dropped", json::array()},
                      {"skipped", json::array()}};
  for (const std::string& text : salvage.state.inferred) {
    const size_t colon = std::min(text.find(": "), text.size());
    certificate["inferred"].push_back(
        {{"what", text.substr(0, colon)},
         {"evidence", colon == text.size() ? "" : text.substr(colon + 2)}});
  }
  std::map<std::string, std::pair<int64_t, int64_t>> sections;
  for (const SalvagedTensor& tensor : salvage.tensors) {
    auto& [whole, all] = sections[tensor.state];
    whole += tensor.status == Status::kExported;
    ++all;
    if (tensor.status == Status::kExported) continue;
    certificate["lossy"].push_back(quote(tensor.name) + " " + tensor.state + ": " +
                                   name(tensor.status));
  }
  for (const auto& [section, counts] : sections)
    certificate["sections"][section] =
        std::to_string(counts.first) + " of " + std::to_string(counts.second) + " tensors";
  for (const std::string& text : salvage.disagreements) certificate["lossy"].push_back(text);
  certificate["skipped"].push_back(
      "param groups, schedulers, loss scaler, counters and client state: salvage takes tensors");
  return certificate;
}

}  // namespace

std::vector<FileBlueprint> salvage_files(Salvage* salvage, int64_t max_shard_bytes) {
  std::map<std::string, std::vector<std::pair<const SalvagedTensor*, int>>> folders;
  NanFill nan(&salvage->state);
  for (SalvagedTensor& tensor : salvage->tensors) {
    if (!tensor.in.empty()) folders[tensor.in].emplace_back(&tensor, tensor.leaf);
    if (tensor.partial_in.empty()) continue;
    nan.fill(tensor);
    folders[tensor.partial_in].emplace_back(&tensor, tensor.partial_leaf);
  }
  Selection selection(salvage->state);
  std::vector<FileBlueprint> result;
  for (const auto& [folder, tensors] : folders) {
    selection.clear();
    for (const auto& [tensor, leaf] : tensors) selection.add(*tensor, leaf);
    const bool weights = folder == "weights" || folder == "partial/weights";
    if (weights || folder == "copies") selection.add_aliases(salvage->state.aliases);
    for (FileBlueprint& file : selection.files(folder, !weights, max_shard_bytes))
      result.push_back(std::move(file));
  }
  return result;
}

json salvage_report(const Salvage& salvage, const std::string& program) {
  const ShardedState& state = salvage.state;
  json report = {{"schema", 1},
                 {"kind", "isoshard-salvage"},
                 {"program", program},
                 {"source",
                  {{"tag", state.tag},
                   {"format", name(state.flavour)},
                   {"topology", to_string(state.topology)},
                   {"stage", state.stage},
                   {"ds_version", state.version}}},
                 {"complete", salvage.complete()},
                 {"files", json::array()},
                 {"tensors", json::array()},
                 {"numbers", json::array()},
                 {"aliases", json::object()},
                 {"disagreements", salvage.disagreements}};
  for (Status status : {Status::kExported, Status::kCopy, Status::kPartial, Status::kLost})
    report["counts"][name(status)] = salvage.count(status);
  for (const SurveyedFile& file : salvage.files) report["files"].push_back(file_json(file));
  for (const SalvagedTensor& tensor : salvage.tensors)
    report["tensors"].push_back(tensor_json(tensor));
  for (const SalvagedNumber& number : salvage.numbers)
    report["numbers"].push_back({{"name", number.name},
                                 {"group", number.group},
                                 {"value", number.value},
                                 {"proven", number.proven}});
  for (const checkpoint::Alias& alias : state.aliases) report["aliases"][alias.name] = alias.target;
  return report;
}

StreamResult write_salvage(Storage& storage, const Salvage& salvage, const ReshardPlan& plan,
                           const SalvageOptions& options) {
  checkpoint::StagedFolder staged(storage, options.target, options.overwrite);
  StreamOptions stream = options.stream;
  stream.sync_files = plan.targets.size() <= 64;
  const StreamResult result = execute(storage, salvage.state, plan, staged.path(), stream);
  for (const FileHash& hash : result.files) read_back(storage, staged.path(), hash);
  checkpoint::Manifest manifest;
  manifest.program_version = options.program;
  for (const FileHash& hash : result.files) manifest.files.push_back(manifest_file(hash));
  const auto write = [&](const std::string& name, const json& object) {
    const std::string text = object.dump(1) + "\n";
    checkpoint::write_new_file(storage, staged.path() + "/" + name, text);
    manifest.files.push_back(
        {name, static_cast<int64_t>(text.size()), "sha256:" + checkpoint::sha256_hex(text)});
  };
  write("salvage.json", salvage_report(salvage, options.program));
  write("certificate.json", certificate_of(salvage, options));
  staged.settle();
  checkpoint::write_new_file(storage, staged.path() + "/" + checkpoint::kManifestName,
                             checkpoint::to_json(manifest));
  staged.publish();
  return result;
}

}  // namespace isoshard::reshard
