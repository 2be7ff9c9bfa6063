// Experts of stage 0: every expert-parallel rank's optimizer file is read as a checkpoint of its
// own, with that rank's experts from their files; then the ranks are joined. See zero0_files.h.
#include <algorithm>
#include <map>
#include <set>

#include "checkpoint/deepspeed/merge.h"
#include "checkpoint/deepspeed/names.h"
#include "checkpoint/deepspeed/zero0_files.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

constexpr const char* kModelFile = "model file";

class Zero0Experts {
 public:
  Zero0Experts(ShardedState* whole, const ModelStates& model, const ExpertInfo& experts,
               const ReadOptions& options, Storage& storage)
      : whole_(*whole),
        model_(model),
        experts_(experts),
        options_(options),
        storage_(storage),
        fields_(whole->document(model.file)) {}

  void run(const std::vector<int>& expert_files, const std::map<int, int>& optim_files);

 private:
  // The experts of a native layer, by their numbers: each one's entries in its file's order.
  struct NativeLayer {
    std::string path;
    std::map<int64_t, std::vector<ModuleEntry>> experts;
  };

  [[noreturn]] void refuse(ErrorCode code, const std::string& what, const std::string& entry,
                           const std::string& expected, const std::string& found,
                           const std::string& next) const {
    throw Error(ErrorInfo{.code = code,
                          .what = what,
                          .file = whole_.folder,
                          .entry = entry,
                          .expected = expected,
                          .found = found,
                          .next = next});
  }

  void read_files(std::vector<int> files);
  void check_native(size_t files) const;
  int count_ranks(const std::map<int, int>& optim_files) const;
  void check_ranks(const std::map<int, int>& optim_files);
  void lose(int rank);
  Zero0Rank rank_of(int rank, const std::map<int, int>& optim_files) const;
  std::vector<ExpertBlock> blocks_of(int rank) const;
  ExpertBlock stacks_of(const ExpertLayer& layer, int rank) const;
  MpPart read(const Zero0Rank& rank);
  void adopt(const MpPart& first);
  void add_again(const MpPart& part, const std::string& place);
  void add_witnesses(const MpPart& part, const ParameterState& again);
  std::map<std::string, int> groups_by_local_name(const MpPart& part, int rank) const;
  std::string local_name(const std::string& name, int rank) const;
  void keep_experts(MpPart* part, int rank, const std::map<std::string, int>& groups) const;
  bool is_expert(const std::string& name) const { return experts_.is_expert(name); }
  bool closed() const { return options_.model_files_only; }

  ShardedState& whole_;
  const ModelStates& model_;
  const ExpertInfo& experts_;
  const ReadOptions& options_;
  Storage& storage_;
  const Fields fields_;
  std::vector<NativeLayer> layers_;            // in the order of their numbers
  std::map<std::string, ModuleEntry> slices_;  // AutoEP: "prefix.w1.3"
  size_t files_ = 0;
  int ranks_ = 1;
  std::set<int> lost_;  // ranks without optimizer file
};

void Zero0Experts::run(const std::vector<int>& expert_files,
                       const std::map<int, int>& optim_files) {
  read_files(expert_files);
  ranks_ = count_ranks(optim_files);
  check_native(expert_files.size());
  check_ranks(optim_files);
  whole_.expert_layout = experts_.autoep() ? ExpertLayout::kAutoEp : ExpertLayout::kNative;
  whole_.topology.expert = ranks_;
  std::vector<MpPart> parts;
  for (int rank = 0; rank < ranks_; ++rank) parts.push_back(read(rank_of(rank, optim_files)));
  int lead = 0;  // the first with an optimizer
  while (lost_.contains(lead)) ++lead;
  adopt(parts[static_cast<size_t>(lead)]);
  const auto groups = groups_by_local_name(parts[static_cast<size_t>(lead)], lead);
  for (int rank = 0; rank < ranks_; ++rank) {
    MpPart& part = parts[static_cast<size_t>(rank)];
    if (rank != lead) add_again(part, "ep rank " + std::to_string(rank));
    keep_experts(&part, rank, groups);
  }
  if (experts_.autoep())
    merge_expert_ranks(&whole_, parts, experts_);
  else
    join_native_ranks(&whole_, parts);
  const NodeId own = fields_.maybe(fields_.root(), "optimizer");
  if (closed() || own == kNoNode || !optim_files.contains(0)) return;
  Zero0Rank copy = rank_of(0, optim_files);
  copy.optimizer = {model_.file, own};
  add_again(read(copy), kModelFile);
}

// In the order of the layers' numbers, then of the experts'.
void Zero0Experts::read_files(std::vector<int> files) {
  files_ = files.size();
  const auto layer_of = [&](int file) {
    const std::string& name = whole_.files[static_cast<size_t>(file)].relative;
    return layer_in_file_name(name).value_or(0);
  };
  std::ranges::stable_sort(files, {}, layer_of);
  std::set<std::string> names;
  for (int file : files) {
    const Fields f(whole_.document(file));
    for (const auto& [name, node] : f.named(f.root(), "expert file")) {
      const TensorView view = f.tensor(node, name);
      if (!names.insert(name).second)
        f.fail("Two files hold the same expert.", quote(name), "one", "two");
      ModuleEntry entry{.leaf = {.name = name,
                                 .state = "param",
                                 .dtype = view.dtype,
                                 .shape = view.shape,
                                 .requires_grad = view.requires_grad,
                                 .fragments = file_fragments(f.document(), file, view)},
                        .local_name = name,
                        .replaced = experts_.autoep()};
      if (experts_.autoep()) {
        slices_.emplace(name, std::move(entry));
        continue;
      }
      const auto number = ExpertInfo::expert_number(name);
      if (!number)
        f.fail("An expert file holds what is no expert.", quote(name), "a name of an expert",
               "another");
      auto layer = std::ranges::find(layers_, number->first, &NativeLayer::path);
      if (layer == layers_.end())
        layer = layers_.insert(layers_.end(), {.path = number->first, .experts = {}});
      layer->experts[number->second].push_back(std::move(entry));
    }
  }
}

// Every layer holds experts 0 … n−1, as many as num_experts says and as many on each rank.
void Zero0Experts::check_native(size_t files) const {
  const NodeId list = fields_.maybe(fields_.root(), "num_experts");
  const bool known = list != kNoNode && fields_.pickle().kind(list) == Kind::kList &&
                     fields_.pickle().items(list).size() == layers_.size();
  for (size_t i = 0; i < layers_.size(); ++i) {
    const NativeLayer& layer = layers_[i];
    const int64_t found = layer.experts.rbegin()->first + 1;
    const int64_t expected =
        known ? fields_.integer(fields_.pickle().items(list)[i], "num_experts") : found;
    for (int64_t id = 0; id < std::max(found, expected); ++id) {
      if (!layer.experts.contains(id))
        refuse_missing_expert(whole_, layer.path + std::to_string(id), files);
      if (id >= expected)
        fields_.fail("There are files of more experts than the layer has.", quote(layer.path),
                     std::to_string(expected), std::to_string(found));
    }
    if (found % ranks_ != 0)
      refuse(ErrorCode::kMismatch, "The expert-parallel ranks do not share a layer's experts.",
             quote(layer.path), "a divisor of " + std::to_string(found) + " experts",
             std::to_string(ranks_) + " ranks",
             "look which files expp_rank_*_optim_states.pt belong to this save");
  }
}

// As AutoEP's metadata says; native: so many that the slots of the experts' groups on each are all
// experts together, or else as many as there are files. (The name of the group, ep_size_2, is stale
// after a load elsewhere.)
int Zero0Experts::count_ranks(const std::map<int, int>& optim_files) const {
  if (experts_.autoep()) return static_cast<int>(experts_.layers()[0].ep_size);
  if (closed()) return 1;
  const int by_files = optim_files.empty() ? 1 : optim_files.rbegin()->first + 1;
  const int file = optim_files.empty() ? model_.file : optim_files.begin()->second;
  const Fields f(whole_.document(file));
  const NodeId optimizer = f.maybe(f.root(), "optimizer");
  if (optimizer == kNoNode) return by_files;
  const NodeId nested = f.maybe(optimizer, "optimizer_state_dict");
  const NodeId groups = f.maybe(nested == kNoNode ? optimizer : nested, "param_groups");
  if (groups == kNoNode) return by_files;
  size_t slots = 0, experts = 0;
  for (NodeId group : f.list(groups, "param_groups")) {
    const NodeId flag = f.maybe(group, "moe");
    if (flag != kNoNode && f.pickle().kind(flag) == Kind::kBool && f.truth(group, "moe"))
      slots += f.list(f.need(group, "params"), "params").size();
  }
  for (const NativeLayer& layer : layers_) {
    for (const auto& [id, entries] : layer.experts) experts += entries.size();
  }
  return slots > 0 && experts % slots == 0 ? static_cast<int>(experts / slots) : by_files;
}

void Zero0Experts::check_ranks(const std::map<int, int>& optim_files) {
  if (ranks_ < 1 || whole_.topology.zero_ranks() % ranks_ != 0)
    refuse(ErrorCode::kMismatch, "The expert-parallel ranks do not divide the world.",
           "expp_rank_*_optim_states.pt",
           "a divisor of dp=" + std::to_string(whole_.topology.zero_ranks()),
           std::to_string(ranks_) + " ranks", "look whether files of two saves are mixed");
  if (closed()) return;
  if (!optim_files.empty() && optim_files.rbegin()->first >= ranks_)
    refuse(ErrorCode::kMismatch,
           "The folder holds optimizer files of more expert-parallel ranks: two saves are mixed.",
           "expp_rank_" + std::to_string(optim_files.rbegin()->first), std::to_string(ranks_),
           std::to_string(optim_files.rbegin()->first + 1),
           "find out which save is the newer one; do not delete before");
  for (int rank = 0; rank < ranks_; ++rank) {
    if (!optim_files.contains(rank)) lose(rank);
  }
  if (static_cast<int>(lost_.size()) == ranks_)
    refuse(ErrorCode::kIncomplete, "No optimizer file of the checkpoint is there.",
           "expp_rank_*_optim_states.pt", std::to_string(ranks_) + " files", "none",
           "bring them from the nodes that wrote them");
}

void Zero0Experts::lose(int rank) {
  const std::string name = "expp_rank_" + std::to_string(rank) + "_mp_rank_00_optim_states.pt";
  if (rank == 0 && fields_.maybe(fields_.root(), "optimizer") != kNoNode) {
    whole_.notices.push_back(name + " is missing; the model file holds the same");
    return;
  }
  if (!options_.lost_experts)
    refuse(ErrorCode::kIncomplete,
           "The optimizer state of an expert-parallel rank is missing (DeepSpeed: "
           "FileNotFoundError).",
           name, std::to_string(ranks_) + " files, expp_rank_0 to " + std::to_string(ranks_ - 1),
           "absent",
           "bring it from the node that wrote it; `isoshard convert` writes the parameters without "
           "it and says what it skipped");
  lost_.insert(rank);
  const std::string text =
      name + " is missing: masters and moments of " +
      (experts_.autoep() ? "all experts are left behind, for a stack is written whole or not at all"
                         : "its experts are left behind") +
      "; their weights are those of the expert files, in the model's dtype";
  whole_.notices.push_back(text);
  whole_.skipped.push_back(text);
}

Zero0Rank Zero0Experts::rank_of(int rank, const std::map<int, int>& optim_files) const {
  Zero0Rank result{.optimizer = {}, .experts = blocks_of(rank), .notice = ""};
  if (const auto file = optim_files.find(rank); file != optim_files.end()) {
    const Fields f(whole_.document(file->second));
    result.optimizer = {file->second, f.need(f.root(), "optimizer")};
  } else if (rank == 0) {
    result.optimizer = {model_.file, fields_.maybe(fields_.root(), "optimizer")};
  }
  return result;
}

std::vector<ExpertBlock> Zero0Experts::blocks_of(int rank) const {
  std::vector<ExpertBlock> blocks;
  for (const ExpertLayer& layer : experts_.layers()) blocks.push_back(stacks_of(layer, rank));
  for (const NativeLayer& layer : layers_) {
    // The layer's gate is registered before its experts (deepspeed/moe/sharded_moe.py, MOELayer).
    ExpertBlock block{.after = layer.path.substr(0, layer.path.find("experts.deepspeed_experts.")),
                      .entries = {}};
    const auto local = static_cast<int64_t>(layer.experts.size()) / ranks_;
    for (int64_t id = rank * local; id < (rank + 1) * local; ++id) {
      for (ModuleEntry entry : layer.experts.at(id)) {
        entry.local_name = ExpertInfo::global_name(entry.leaf.name, -rank, local);
        block.entries.push_back(std::move(entry));
      }
    }
    blocks.push_back(std::move(block));
  }
  return blocks;
}

// A rank's w1, w2, w3 of a layer: [local experts, …], from one file an expert.
ExpertBlock Zero0Experts::stacks_of(const ExpertLayer& layer, int rank) const {
  ExpertBlock block{.after = router_of(layer), .entries = {}};
  for (const char* stack : {".w1", ".w2", ".w3"}) {
    ModuleEntry whole{.leaf = {}, .local_name = layer.prefix + stack, .replaced = true};
    int64_t count = 0;
    for (int64_t id : layer.placement.at(static_cast<size_t>(rank))) {
      const std::string name = whole.local_name + "." + std::to_string(id);
      const auto found = slices_.find(name);
      if (found == slices_.end()) refuse_missing_expert(whole_, name, files_);
      const Leaf& slice = found->second.leaf;
      if (count++ == 0) {
        whole.leaf = slice;
        whole.leaf.name = whole.local_name;
        continue;
      }
      if (slice.shape != whole.leaf.shape || slice.dtype != whole.leaf.dtype)
        refuse(ErrorCode::kMismatch, "Experts of one layer have different shapes or dtypes.",
               quote(name), to_string(whole.leaf.shape) + " " + isoshard::name(whole.leaf.dtype),
               to_string(slice.shape) + " " + isoshard::name(slice.dtype),
               "look whether the file is of another save");
      append_fragments(slice, 0, slice.size_elements(), (count - 1) * slice.size_elements(),
                       &whole.leaf.fragments);
    }
    whole.leaf.shape.insert(whole.leaf.shape.begin(), count);
    block.entries.push_back(std::move(whole));
  }
  return block;
}

MpPart Zero0Experts::read(const Zero0Rank& rank) {
  MpPart part{.state = {}, .model = model_};
  part.state.folder = whole_.folder;
  part.state.topology = whole_.topology;
  part.state.has_places = whole_.has_places;
  part.state.files = std::move(whole_.files);
  read_zero0_rank(&part.state, model_, experts_, rank, options_, storage_);
  whole_.files = std::move(part.state.files);
  return part;
}

// Everything but the experts is as rank 0 has it.
void Zero0Experts::adopt(const MpPart& first) {
  const ShardedState& from = first.state;
  whole_.flavour = from.flavour;
  whole_.stage = from.stage;
  whole_.stepped = from.stepped;
  whole_.leaves = from.leaves;
  whole_.buffers = from.buffers;
  whole_.aliases = from.aliases;
  whole_.module_order = from.module_order;
  const auto append = [](std::vector<std::string>* to, const std::vector<std::string>& list) {
    to->insert(to->end(), list.begin(), list.end());
  };
  append(&whole_.inferred, from.inferred);
  append(&whole_.notices, from.notices);
  for (const GroupState& group : from.groups) whole_.groups.push_back({group.hyper, {}, {}});
  for (const ParameterState& parameter : from.parameters) {
    if (is_expert(parameter.name)) continue;
    if (parameter.group >= 0) {
      GroupState& group = whole_.groups[static_cast<size_t>(parameter.group)];
      group.parameters.push_back(static_cast<int>(whole_.parameters.size()));
      group.flat_order.push_back(group.parameters.back());
    }
    whole_.parameters.push_back(parameter);
  }
}

// What another optimizer says again of parameters that the whole has must be equal.
void Zero0Experts::add_again(const MpPart& part, const std::string& place) {
  ScalarTexts texts(whole_);
  for (const ParameterState& again : part.state.parameters) {
    const ParameterState* first = whole_.find_parameter(again.name);
    if (again.group < 0) continue;
    if (first == nullptr || first->shape != again.shape) {
      if (place == kModelFile) add_witnesses(part, again);
      continue;
    }
    const auto refuse_pair = [&](const std::string& expected, const std::string& found) {
      refuse(ErrorCode::kMismatch,
             "Optimizers of two expert-parallel ranks disagree: files of two saves are mixed.",
             quote(again.name) + ", " + place, expected, found,
             "put the files of one save together");
    };
    if (first->group != again.group)
      refuse_pair("group " + std::to_string(first->group), "group " + std::to_string(again.group));
    const std::string expected = texts.of(first->scalars), found = texts.of(again.scalars);
    if (expected != found) refuse_pair(expected, found);
    if (first->states.size() != again.states.size())
      refuse_pair(std::to_string(first->states.size()) + " states",
                  std::to_string(again.states.size()));
    const auto pair = [&](int original, int copy) {
      Leaf leaf = part.state.leaf(copy);
      if (original < 0) refuse_pair("as in rank 0", quote(leaf.state));
      leaf.state = place;
      whole_.replicas.emplace_back(original, whole_.add_leaf(std::move(leaf)));
    };
    pair(first->weight, again.weight);
    for (int copy : again.states)
      pair(whole_.state_leaf(*first, part.state.leaf(copy).state), copy);
  }
}

// A stack of rank 0 lies in the whole stack, which the model file's copy is not compared with.
void Zero0Experts::add_witnesses(const MpPart& part, const ParameterState& again) {
  std::vector<int> leaves = again.states;
  leaves.push_back(again.weight);
  for (int number : leaves) {
    Leaf leaf = part.state.leaf(number);
    leaf.state += std::string(", ") + kModelFile;
    whole_.witnesses.push_back(whole_.add_leaf(std::move(leaf)));
  }
}

std::string Zero0Experts::local_name(const std::string& name, int rank) const {
  const auto number = ExpertInfo::expert_number(name);
  if (!number) return name;
  const auto layer = std::ranges::find(layers_, number->first, &NativeLayer::path);
  return ExpertInfo::global_name(name, -rank, static_cast<int64_t>(layer->experts.size()) / ranks_);
}

std::map<std::string, int> Zero0Experts::groups_by_local_name(const MpPart& part, int rank) const {
  std::map<std::string, int> groups;
  for (const ParameterState& parameter : part.state.parameters) {
    if (is_expert(parameter.name)) groups[local_name(parameter.name, rank)] = parameter.group;
  }
  return groups;
}

// Leaves the part its experts, with the leaves that they use. Where an optimizer file is lost they
// stand in the group that the same experts of another rank have, with weights alone.
void Zero0Experts::keep_experts(MpPart* part, int rank,
                                const std::map<std::string, int>& groups) const {
  std::vector<ParameterState> kept;
  std::vector<Leaf> leaves;
  const auto move_leaf = [&](int* number) {
    if (*number < 0) return;
    leaves.push_back(part->state.leaf(*number));
    *number = static_cast<int>(leaves.size()) - 1;
  };
  const bool lost = experts_.autoep() ? !lost_.empty() : lost_.contains(rank);
  for (ParameterState parameter : part->state.parameters) {
    if (!is_expert(parameter.name)) continue;
    if (lost) {
      parameter.group = groups.at(local_name(parameter.name, rank));
      if (parameter.model_copy >= 0) parameter.weight = parameter.model_copy;
      parameter.model_copy = -1;
      parameter.states.clear();
      parameter.scalars.clear();
    }
    if (parameter.group < 0 && !closed())
      refuse(ErrorCode::kUnsupported,
             "Experts that the optimizer does not train (frozen) are not supported yet.",
             quote(parameter.name), "trained experts alone", "one without a slot in the optimizer",
             "`isoshard help` lists what this version reads");
    move_leaf(&parameter.weight);
    move_leaf(&parameter.model_copy);
    for (int& state : parameter.states) move_leaf(&state);
    kept.push_back(std::move(parameter));
  }
  part->state.groups.resize(whole_.groups.size());
  part->state.leaves = std::move(leaves);
  part->state.set_parameters(std::move(kept));
}

}  // namespace

void read_zero0_experts(ShardedState* state, const ModelStates& model, const ExpertInfo& experts,
                        const std::vector<int>& expert_files, const std::map<int, int>& optim_files,
                        const ReadOptions& options, Storage& storage) {
  Zero0Experts(state, model, experts, options, storage).run(expert_files, optim_files);
}

}  // namespace isoshard::checkpoint
