// See pipeline.h.
#include "checkpoint/deepspeed/pipeline.h"

#include <algorithm>
#include <charconv>
#include <map>

#include "checkpoint/deepspeed/reader.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

class StageUnion {
 public:
  StageUnion(ShardedState* whole, const std::vector<MpPart>& stages)
      : whole_(*whole), stages_(stages) {}

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
  void add_again(size_t stage, const ParameterState& again, int leaf_shift);

  ShardedState& whole_;
  const std::vector<MpPart>& stages_;
  std::map<std::string, size_t> known_;  // number in whole_.parameters
};

void StageUnion::check(size_t stage) const {
  const ModelStates &a = stages_[0].model, &b = stages_[stage].model;
  const bool same = a.global_steps == b.global_steps && a.version == b.version &&
                    a.dp_world == b.dp_world &&
                    stages_[0].state.groups.size() == stages_[stage].state.groups.size();
  if (same) return;
  throw Error(ErrorInfo{.code = ErrorCode::kMismatch,
                        .what = "Two pipeline stages' files do not belong together.",
                        .file = whole_.document(b.file).path(),
                        .entry = "global_steps, ds_version, dp_world_size, number of groups",
                        .expected = "as in stage 0: step " + std::to_string(a.global_steps) +
                                    ", " + a.version + ", dp " + std::to_string(a.dp_world),
                        .found = "step " + std::to_string(b.global_steps) + ", " + b.version +
                                 ", dp " + std::to_string(b.dp_world),
                        .next = "put the files of one save together"});
}

void StageUnion::add(size_t stage) {
  check(stage);
  const ShardedState& part = stages_[stage].state;
  const int shift = static_cast<int>(whole_.leaves.size());
  whole_.leaves.insert(whole_.leaves.end(), part.leaves.begin(), part.leaves.end());
  whole_.stepped = whole_.stepped || part.stepped;
  std::vector<int> numbers;  // by number in the part; −1: known already
  for (ParameterState parameter : part.parameters) {
    if (known_.contains(parameter.name)) {
      add_again(stage, parameter, shift);
      numbers.push_back(-1);
      continue;
    }
    if (parameter.weight >= 0) parameter.weight += shift;
    for (int& leaf : parameter.states) leaf += shift;
    known_.emplace(parameter.name, whole_.parameters.size());
    numbers.push_back(static_cast<int>(whole_.parameters.size()));
    whole_.parameters.push_back(std::move(parameter));
  }
  for (size_t g = 0; g < part.groups.size(); ++g) {
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

// A tied parameter: the first stage's counts, this one's must be equal.
void StageUnion::add_again(size_t stage, const ParameterState& again, int leaf_shift) {
  const ParameterState& first = whole_.parameters[known_.at(again.name)];
  std::vector<int> originals = first.states, copies = again.states;
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
  if (originals.size() != copies.size())
    refuse(std::to_string(originals.size()) + " states", std::to_string(copies.size()));
  for (size_t i = 0; i < copies.size(); ++i) {
    if (copies[i] < 0 || originals[i] < 0) continue;
    Leaf& copy = whole_.leaf(copies[i] + leaf_shift);
    copy.state = "pp stage " + std::to_string(stage);
    whole_.replicas.emplace_back(originals[i], copies[i] + leaf_shift);
  }
}

// The number in "layer_03-model_states.pt".
std::string layer_number(const std::string& file) {
  int64_t number = 0;
  std::from_chars(file.data() + 6, file.data() + file.size(), number);
  return std::to_string(number);
}

}  // namespace

void join_stages(ShardedState* whole, const std::vector<MpPart>& stages) {
  StageUnion(whole, stages).run();
}

void add_layer_copies(ShardedState* state, const std::vector<int>& files) {
  std::vector<ParameterState> parameters = state->parameters;
  const auto is_tied = [](const ParameterState& parameter, const std::string& local) {
    return parameter.name.starts_with("tied_modules.") && parameter.name.ends_with("." + local);
  };
  for (int file : files) {
    const TorchFile& document = state->document(file);
    const Fields fields(document);
    const std::string layer = layer_number(state->files[static_cast<size_t>(file)].relative);
    for (const auto& [local, node] : fields.named(fields.root(), "layer")) {
      const TensorView view = fields.tensor(node, local);
      const std::string name = layer + "." + local;
      auto found = std::find_if(parameters.begin(), parameters.end(),
                                [&](const ParameterState& p) { return p.name == name; });
      if (found == parameters.end()) {
        found = std::find_if(parameters.begin(), parameters.end(), [&](const ParameterState& p) {
          return is_tied(p, local) && p.shape == view.shape && p.model_copy < 0;
        });
      }
      Leaf leaf{.name = found == parameters.end() ? name : found->name,
                .state = "param",
                .dtype = view.dtype,
                .shape = view.shape,
                .fragments = file_fragments(document, file, view)};
      if (found != parameters.end() && found->shape != view.shape)
        fields.fail("A parameter has two shapes.", quote(name), to_string(found->shape),
                    to_string(view.shape));
      const int number = state->add_leaf(std::move(leaf));
      if (found != parameters.end()) {
        found->model_copy = number;
        found->model_dtype = view.dtype;
        continue;
      }
      ParameterState frozen{.name = name,
                            .shape = view.shape,
                            .weight = number,
                            .model_dtype = view.dtype,
                            .states = {},
                            .scalars = {}};
      parameters.push_back(std::move(frozen));
    }
  }
  state->set_parameters(std::move(parameters));
}

}  // namespace isoshard::checkpoint
