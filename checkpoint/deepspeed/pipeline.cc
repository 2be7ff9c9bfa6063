// See pipeline.h.
#include "checkpoint/deepspeed/pipeline.h"

#include <algorithm>
#include <charconv>
#include <map>
#include <optional>
#include <unordered_map>

#include "checkpoint/deepspeed/names.h"
#include "checkpoint/deepspeed/reader.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

class StageUnion {
 public:
  StageUnion(ShardedState* whole, const std::vector<MpPart>& stages)
      : whole_(*whole), stages_(stages), scalar_texts_(*whole) {}

  void run() {
    const ShardedState& first = stages_[0].state;
    whole_.flavour = first.flavour;
    whole_.stage = first.stage;
    whole_.round_robin = first.round_robin;
    for (const GroupState& group : first.groups) {
      whole_.groups.emplace_back();
      whole_.groups.back().hyper = group.hyper;
    }
    for (size_t stage = 0; stage < stages_.size(); ++stage) add(stage);
  }

 private:
  void check(size_t stage) const;
  void add(size_t stage);
  void check_step(size_t stage, const ParameterState& parameter);
  void add_again(size_t stage, const ParameterState& again, int leaf_shift);

  ShardedState& whole_;
  const std::vector<MpPart>& stages_;
  ScalarTexts scalar_texts_;
  std::map<std::string, size_t> known_;  // number in whole_.parameters
  std::map<int, std::string> steps_;  // by group: numbers such as step, as the first stage has them
};

std::string degrees(const ModelStates& model) {
  return ", tp " + std::to_string(model.tp_degree) + ", pp " + std::to_string(model.pp_degree);
}

void StageUnion::check(size_t stage) const {
  const ModelStates &a = stages_[0].model, &b = stages_[stage].model;
  const bool same = a.global_steps == b.global_steps && a.version == b.version &&
                    a.dp_world == b.dp_world && a.tp_degree == b.tp_degree &&
                    a.pp_degree == b.pp_degree &&
                    stages_[0].state.groups.size() == stages_[stage].state.groups.size();
  if (same) return;
  throw Error(ErrorInfo{.code = ErrorCode::kMismatch,
                        .what = "Two pipeline stages' files do not belong together.",
                        .file = whole_.document(b.file).path(),
                        .entry = "global_steps, ds_version, dp_world_size, number of groups, "
                                 "checkpoint_parallel_dimensions",
                        .expected = "as in stage 0: step " + std::to_string(a.global_steps) + ", " +
                                    a.version + ", dp " + std::to_string(a.dp_world) + degrees(a),
                        .found = "step " + std::to_string(b.global_steps) + ", " + b.version +
                                 ", dp " + std::to_string(b.dp_world) + degrees(b),
                        .next = "put the files of one save together"});
}

void StageUnion::add(size_t stage) {
  check(stage);
  const ShardedState& part = stages_[stage].state;
  const int shift = static_cast<int>(whole_.leaves.size());
  whole_.leaves.insert(whole_.leaves.end(), part.leaves.begin(), part.leaves.end());
  whole_.stepped = whole_.stepped || part.stepped;
  for (const auto& [original, copy] : part.replicas)
    whole_.replicas.emplace_back(original + shift, copy + shift);
  std::vector<int> numbers;  // by number in the part; −1: known already
  for (ParameterState parameter : part.parameters) {
    check_step(stage, parameter);
    if (known_.contains(parameter.name)) {
      add_again(stage, parameter, shift);
      numbers.push_back(-1);
      continue;
    }
    if (parameter.weight >= 0) parameter.weight += shift;
    for (int& leaf : parameter.states) leaf += shift;
    if (parameter.model_copy >= 0) parameter.model_copy += shift;
    known_.emplace(parameter.name, whole_.parameters.size());
    numbers.push_back(static_cast<int>(whole_.parameters.size()));
    whole_.parameters.push_back(std::move(parameter));
  }
  const Fields model(whole_.document(stages_[stage].model.file));
  whole_.pipeline.buffers.emplace_back();
  for (NodeId name : model.list(model.need(model.root(), "buffer_names"), "buffer_names"))
    whole_.pipeline.buffers.back().push_back(model.text(name, "buffer_names"));
  for (const BufferState& buffer : part.buffers)
    whole_.buffers.push_back({buffer.name, buffer.leaf + shift});
  for (Alias alias : part.aliases) {
    if (alias.model_copy >= 0) alias.model_copy += shift;
    whole_.aliases.push_back(std::move(alias));
  }
  whole_.pipeline.held.emplace_back();
  for (size_t g = 0; g < part.groups.size(); ++g) {
    for (int number : part.groups[g].parameters) {
      const std::string& name = part.parameters[static_cast<size_t>(number)].name;
      whole_.pipeline.held.back().push_back(static_cast<int>(known_.at(name)));
    }
    const auto append = [&](std::vector<int>* to, const std::vector<int>& from) {
      for (int number : from) {
        if (numbers[static_cast<size_t>(number)] >= 0)
          to->push_back(numbers[static_cast<size_t>(number)]);
      }
    };
    append(&whole_.groups[g].parameters, part.groups[g].parameters);
    append(&whole_.groups[g].flat_order, part.groups[g].flat_order);
  }
}

// The same group of all stages stands at the same step.
void StageUnion::check_step(size_t stage, const ParameterState& parameter) {
  if (parameter.group < 0) return;
  const std::string text = scalar_texts_.of(parameter.scalars);
  const auto [known, fresh] = steps_.emplace(parameter.group, text);
  if (fresh || known->second == text) return;
  throw Error(ErrorInfo{.code = ErrorCode::kMismatch,
                        .what = "Ranks stand at different steps: files of two saves are mixed.",
                        .file = whole_.document(stages_[stage].model.file).path(),
                        .entry = quote(parameter.name),
                        .expected = "as in stage 0: " + known->second,
                        .found = text,
                        .next = "put the files of one save together"});
}

// A tied parameter: the first stage's counts, this one's must be equal.
void StageUnion::add_again(size_t stage, const ParameterState& again, int leaf_shift) {
  const ParameterState& first = whole_.parameters[known_.at(again.name)];
  std::vector<int> originals, copies;
  const ShardedState& part = stages_[stage].state;
  for (int leaf : again.states) {
    originals.push_back(whole_.state_leaf(first, part.leaf(leaf).state));
    copies.push_back(leaf);
  }
  originals.push_back(first.weight);
  copies.push_back(again.weight);
  const auto refuse = [&](const std::string& expected, const std::string& found) {
    throw Error(ErrorInfo{.code = ErrorCode::kMismatch,
                          .what = "Pipeline replicas of a parameter disagree (DeepSpeed: "
                                  "AssertionError).",
                          .file = whole_.document(stages_[stage].model.file).path(),
                          .entry = quote(again.name),
                          .expected = expected,
                          .found = found,
                          .next = "put the files of one save together"});
  };
  if (again.shape != first.shape || again.group != first.group)
    refuse(to_string(first.shape), to_string(again.shape));
  if (first.states.size() != again.states.size())
    refuse(std::to_string(first.states.size()) + " states", std::to_string(again.states.size()));
  for (size_t i = 0; i < copies.size(); ++i) {
    if (copies[i] < 0) continue;  // the optimizer's files stay closed
    if (originals[i] < 0 && i + 1 < copies.size())
      refuse("as in the first stage", part.leaf(copies[i]).state);
    if (originals[i] < 0) continue;
    Leaf& copy = whole_.leaf(copies[i] + leaf_shift);
    copy.state = "pp stage " + std::to_string(stage);
    whole_.replicas.emplace_back(originals[i], copies[i] + leaf_shift);
  }
}

}  // namespace

int layer_in_name(const std::string& parameter) {
  int layer = 0;
  const char* end = parameter.data() + parameter.size();
  const auto [rest, error] = std::from_chars(parameter.data(), end, layer);
  return error == std::errc() && rest != end && *rest == '.' ? layer : kNoLayer;
}

std::string tied_key(const std::string& parameter) {
  constexpr std::string_view kTied = "tied_modules.";
  if (!parameter.starts_with(kTied)) return "";
  return parameter.substr(kTied.size(), parameter.find('.', kTied.size()) - kTied.size());
}

std::vector<StageHolding> stage_holdings(const ShardedState& state) {
  std::vector<StageHolding> result;
  for (const std::vector<int>& held : state.pipeline.held) {
    StageHolding& holding = result.emplace_back();
    for (int number : held) {
      const std::string& name = state.parameters[static_cast<size_t>(number)].name;
      if (const int layer = layer_in_name(name); layer != kNoLayer)
        holding.layers.insert(layer);
      else
        holding.keys.insert(tied_key(name));
    }
  }
  return result;
}

int layer_of_file(const ShardedState& state, int file) {
  const std::string& name = state.files[static_cast<size_t>(file)].relative;
  return static_cast<int>(layer_in_file_name(name).value());
}

void join_stages(ShardedState* whole, const std::vector<MpPart>& stages) {
  StageUnion(whole, stages).run();
}

namespace {

// Finds the parameter of a layer's tensor, and gives it its copy.
class LayerCopies {
 public:
  LayerCopies(ShardedState* state, const std::set<std::string>& buffers)
      : state_(*state), buffers_(buffers), parameters_(state->parameters) {
    for (size_t i = 0; i < parameters_.size(); ++i) {
      known_.emplace(parameters_[i].name, i);
      if (!tied_key(parameters_[i].name).empty()) tied_.push_back(i);
    }
  }

  void add(int file) {
    const Fields fields(state_.document(file));
    layer_ = layer_of_file(state_, file);
    const std::string layer = std::to_string(layer_);
    for (const auto& [local, node] : fields.named(fields.root(), "layer"))
      add_tensor(fields, file, layer + "." + local, local, fields.tensor(node, local));
  }

  void finish() { state_.set_parameters(std::move(parameters_)); }

 private:
  void add_tensor(const Fields& fields, int file, const std::string& name, const std::string& local,
                  const TensorView& view);
  std::optional<size_t> owner_of(const Fields& fields, const std::string& name,
                                 const std::string& local, const Shape& shape) const;

  ShardedState& state_;
  const std::set<std::string>& buffers_;
  std::vector<ParameterState> parameters_;
  std::unordered_map<std::string, size_t> known_;
  std::vector<size_t> tied_;
  int layer_ = 0;  // of the file that is being read
};

std::optional<size_t> LayerCopies::owner_of(const Fields& fields, const std::string& name,
                                            const std::string& local, const Shape& shape) const {
  if (const auto found = known_.find(name); found != known_.end()) return found->second;
  std::vector<size_t> candidates;
  for (size_t number : tied_) {
    const ParameterState& parameter = parameters_[number];
    if (parameter.shape == shape && parameter.name.ends_with("." + local))
      candidates.push_back(number);
  }
  if (candidates.empty()) return std::nullopt;
  if (candidates.size() == 1) return candidates[0];
  throw Error(ErrorInfo{
      .code = ErrorCode::kUnsupported,
      .what = "A layer's tensor may belong to several tied modules; no file says to which.",
      .file = fields.document().path(),
      .entry = quote(name),
      .expected = "one tied module with a tensor of that name and shape",
      .found =
          quote(parameters_[candidates[0]].name) + ", " + quote(parameters_[candidates[1]].name),
      .next = "give the tied modules tensors of different names"});
}

void LayerCopies::add_tensor(const Fields& fields, int file, const std::string& name,
                             const std::string& local, const TensorView& view) {
  const int leaf = state_.add_leaf({.name = name,
                                    .state = "param",
                                    .dtype = view.dtype,
                                    .shape = view.shape,
                                    .fragments = file_fragments(fields.document(), file, view)});
  auto& tensors = state_.pipeline.tensors[layer_];
  tensors.emplace_back(local, name);
  if (buffers_.contains(name)) {
    state_.buffers.push_back({name, leaf});
    return;
  }
  const std::optional<size_t> owner = owner_of(fields, name, local, view.shape);
  if (!owner) {
    state_.inferred.push_back(quote(name) + ": frozen, as no optimizer group names it");
    known_.emplace(name, parameters_.size());
    parameters_.push_back({.name = name,
                           .shape = view.shape,
                           .weight = leaf,
                           .model_dtype = view.dtype,
                           .states = {},
                           .scalars = {}});
    return;
  }
  ParameterState& parameter = parameters_[*owner];
  if (const std::string key = tied_key(parameter.name); !key.empty())
    state_.pipeline.tied_layers[key].insert(layer_);
  if (parameter.shape != view.shape)
    fields.fail("A parameter has two shapes.", quote(name), to_string(parameter.shape),
                to_string(view.shape));
  state_.leaf(leaf).name = parameter.name;
  tensors.back().second = parameter.name;
  if (parameter.model_copy >= 0) {  // another layer's copy of a tied module
    state_.leaf(leaf).state = "layer " + name.substr(0, name.find('.'));
    state_.replicas.emplace_back(parameter.model_copy, leaf);
    return;
  }
  parameter.model_copy = leaf;
  parameter.model_dtype = view.dtype;
}

}  // namespace

void add_layer_copies(ShardedState* state, const std::set<std::string>& buffers,
                      const std::vector<int>& files) {
  state->pipeline.layer_files = files;
  LayerCopies copies(state, buffers);
  for (int file : files) copies.add(file);
  copies.finish();
}

std::string layer_file_name(int layer, int rank, int ranks) {
  const std::string front = "layer_" + two_digits(layer);
  return ranks == 1 ? front + "-model_states.pt"
                    : front + "-model_" + two_digits(rank) + "-model_states.pt";
}

std::vector<std::vector<std::string>> layer_files_by_rank(const std::vector<std::string>& names,
                                                          int ranks, const std::string& folder) {
  constexpr int kMostLayers = 100'000;
  std::vector<std::vector<std::string>> result(static_cast<size_t>(ranks));
  std::set<int> layers;
  std::map<std::pair<int, int>, std::string> files;  // by layer and rank
  for (const std::string& name : names) {
    const auto layer =
        static_cast<int>(std::min<int64_t>(layer_in_file_name(name).value_or(-1), kMostLayers + 1));
    int rank = 0;
    while (rank < ranks && name != layer_file_name(layer, rank, ranks)) ++rank;
    if (ranks == 1 && name == "layer_" + two_digits(layer) + "-model_00-model_states.pt") rank = 0;
    const bool named = rank < ranks && layer >= 0 && layer <= kMostLayers;
    const auto [first, fresh] = files.emplace(std::pair(layer, rank), name);
    if (named && fresh) {
      result[static_cast<size_t>(rank)].push_back(name);
      layers.insert(layer);
      continue;
    }
    throw Error(ErrorInfo{
        .code = ErrorCode::kMismatch,
        .what = fresh ? "A layer's file does not have the name that DeepSpeed gives it."
                      : "Two files are of one layer; DeepSpeed takes them for shards.",
        .file = folder + "/" + name,
        .expected = layer_file_name(0, 0, ranks) + " and so on, for " + std::to_string(ranks) +
                    " tensor-parallel rank(s), once for each layer up to " +
                    std::to_string(kMostLayers),
        .found = fresh ? name : first->second + " and " + name,
        .next = "remove what is stale after looking at it, or rename it back"});
  }
  for (int rank = 0; rank < ranks; ++rank) {
    for (int layer : layers) {
      if (files.contains({layer, rank})) continue;
      throw Error(ErrorInfo{.code = ErrorCode::kIncomplete,
                            .what = "The checkpoint is incomplete: a layer's file is missing.",
                            .file = folder,
                            .expected = layer_file_name(layer, rank, ranks),
                            .found = "that layer's of other tensor-parallel ranks",
                            .next = "bring it from the node that wrote it"});
    }
  }
  return result;
}

void adopt_stages(ShardedState* whole, const std::vector<MpPart>& parts) {
  std::unordered_map<std::string, int> numbers;
  for (size_t i = 0; i < whole->parameters.size(); ++i)
    numbers.emplace(whole->parameters[i].name, static_cast<int>(i));
  const ShardedState& first = parts.at(0).state;
  whole->pipeline = first.pipeline;
  for (std::vector<int>& held : whole->pipeline.held) {
    for (int& number : held) {
      number = numbers.at(first.parameters[static_cast<size_t>(number)].name);
    }
  }
  whole->pipeline.layer_files.clear();
  for (size_t rank = 0; rank < parts.size(); ++rank) {
    const ShardedState& part = parts[rank].state;
    whole->pipeline.layer_files.insert(whole->pipeline.layer_files.end(),
                                       part.pipeline.layer_files.begin(),
                                       part.pipeline.layer_files.end());
    add_once(&whole->inferred, part.inferred);
    for (const auto& [original, copy] : part.replicas) {
      Leaf again = part.leaf(copy);
      if (parts.size() > 1) again.state += ", " + rank_name(rank);
      const int one = whole->add_leaf(part.leaf(original));
      whole->replicas.emplace_back(one, whole->add_leaf(std::move(again)));
    }
  }
}

void check_layer_copies(const ShardedState& state, const std::set<std::string>& buffers) {
  const auto refuse = [&](ErrorCode code, const std::string& what, const std::string& name,
                          const std::string& next) {
    throw Error(ErrorInfo{
        .code = code,
        .what = what,
        .file = state.folder,
        .entry = quote(name),
        .expected = "layer_NN-model_states.pt of its layer",
        .found = std::to_string(state.pipeline.layer_files.size()) + " layer files without it",
        .next = next});
  };
  const std::string next = "bring it from the node that wrote it, or use an older checkpoint";
  for (const ParameterState& parameter : state.parameters) {
    if ((parameter.group < 0 ? parameter.weight : parameter.model_copy) < 0)
      refuse(ErrorCode::kIncomplete, "The checkpoint is incomplete: a layer's file is missing.",
             parameter.name, next);
  }
  for (const std::string& name : buffers) {
    if (!tied_key(name).empty())
      refuse(ErrorCode::kUnsupported, "Buffers of tied modules are not supported yet.", name,
             "convert the checkpoint with DeepSpeed (ds_to_universal.py), which leaves them out");
    if (std::ranges::none_of(state.buffers, [&](const BufferState& b) { return b.name == name; }))
      refuse(ErrorCode::kIncomplete, "The checkpoint is incomplete: a layer's file lacks a buffer.",
             name, next);
  }
}

}  // namespace isoshard::checkpoint
