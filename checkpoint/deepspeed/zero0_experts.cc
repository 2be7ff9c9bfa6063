// Experts of stage 0: every expert-parallel rank's optimizer file is read as a checkpoint of its
// own, with that rank's experts from their files; then the ranks are joined. See zero0_files.h.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>

#include "checkpoint/deepspeed/expert_tensors.h"
#include "checkpoint/deepspeed/hyper.h"
#include "checkpoint/deepspeed/merge.h"
#include "checkpoint/deepspeed/names.h"
#include "checkpoint/deepspeed/zero0_files.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

class Zero0Experts {
 public:
  Zero0Experts(ShardedState* whole, const ModelStates& model, const ExpertInfo& experts,
               const std::vector<int>& files, const ReadOptions& options, Storage& storage)
      : whole_(*whole),
        model_(model),
        experts_(experts),
        options_(options),
        storage_(storage),
        fields_(whole->document(model.file)),
        tensors_(*whole, model, experts, files) {}

  void run(const std::map<int, int>& optim_files);

 private:
  int count_ranks(const std::map<int, int>& optim_files) const;
  void check_ranks(const std::map<int, int>& optim_files);
  void lose(int rank);
  Zero0Rank rank_of(int rank, const std::map<int, int>& optim_files) const;
  MpPart read(const Zero0Rank& rank);
  void adopt(const MpPart& first);
  void add_again(const MpPart& part, const std::string& place, const MpPart* own = nullptr);
  std::string hyper_of(const MpPart& part) const;
  std::map<std::string, int> groups_by_local_name(const MpPart& part, int rank) const;
  void keep_experts(MpPart* part, int rank, const std::map<std::string, int>& groups) const;
  bool is_expert(const std::string& name) const { return experts_.is_expert(name); }
  bool closed() const { return options_.model_files_only; }

  ShardedState& whole_;
  const ModelStates& model_;
  const ExpertInfo& experts_;
  const ReadOptions& options_;
  Storage& storage_;
  const Fields fields_;
  const ExpertTensors tensors_;
  int ranks_ = 1;
  std::set<int> lost_;  // ranks without optimizer file
  std::string hyper_;   // of the first rank with one
};

void Zero0Experts::run(const std::map<int, int>& optim_files) {
  ranks_ = count_ranks(optim_files);
  check_ranks(optim_files);
  whole_.expert_layout = experts_.autoep() ? ExpertLayout::kAutoEp : ExpertLayout::kNative;
  whole_.topology.expert = ranks_;
  std::vector<MpPart> parts;
  for (int rank = 0; rank < ranks_; ++rank) parts.push_back(read(rank_of(rank, optim_files)));
  int lead = 0;  // the first with an optimizer
  while (lost_.contains(lead)) ++lead;
  adopt(parts[static_cast<size_t>(lead)]);
  if (!whole_.groups.empty()) hyper_ = hyper_of(parts[static_cast<size_t>(lead)]);
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
  add_again(read(copy), "model file", &parts[0]);
}

// As AutoEP's metadata says. Native: as many as there are files, unless the slots of the experts'
// groups say that files are missing. The name of the group, ep_size_2, may be stale after a load
// elsewhere; where it agrees with the files they are believed.
int Zero0Experts::count_ranks(const std::map<int, int>& optim_files) const {
  if (experts_.autoep()) return static_cast<int>(experts_.layers()[0].ep_size);
  if (closed()) return 1;
  const int by_files = optim_files.empty() ? 1 : optim_files.rbegin()->first + 1;
  const int file = optim_files.empty() ? model_.file : optim_files.begin()->second;
  const Fields f(whole_.document(file));
  const NodeId optimizer = f.maybe(f.root(), "optimizer");
  if (optimizer == kNoNode) return by_files;
  const NodeId groups = f.maybe(torch_state(f, optimizer), "param_groups");
  if (groups == kNoNode) return by_files;
  size_t slots = 0, experts = 0;
  std::set<std::string> names;
  for (NodeId group : f.list(groups, "param_groups")) {
    const NodeId name = f.maybe(group, "name");
    const bool named = name != kNoNode && f.pickle().kind(name) == Kind::kString &&
                       f.text(name, "name").starts_with("ep_size_");
    if (named) names.insert(f.text(name, "name"));
    if (is_group_of_experts(f, group)) slots += f.list(f.need(group, "params"), "params").size();
  }
  if (names.size() > 1)
    whole_.refuse(ErrorCode::kUnsupported,
                  "Layers of several expert-parallel sizes are not supported.", "param_groups",
                  "one size", *names.begin() + " and " + *names.rbegin(),
                  "`isoshard help` lists what this version reads");
  for (const ExpertTensors::NativeLayer& layer : tensors_.layers()) {
    for (const auto& [id, entries] : layer.experts) experts += entries.size();
  }
  // What the ranks would hold together must be what the files hold.
  const auto check_all = [&](int ranks) {
    if (slots == 0 || slots * static_cast<size_t>(ranks) == experts) return ranks;
    whole_.refuse(
        ErrorCode::kUnsupported,
        "The optimizer does not train as many tensors of experts as there are: experts are "
        "frozen, or layers have different expert-parallel sizes; neither is supported yet.",
        "param_groups, moe: True", std::to_string(experts) + " on all ranks",
        std::to_string(slots) + " on each of " + std::to_string(ranks),
        "`isoshard help` lists what this version reads");
  };
  const std::string files_say = "ep_size_" + std::to_string(by_files);
  if (slots == 0 && !names.empty() && !names.contains(files_say))
    return std::max(by_files, std::atoi(names.begin()->c_str() + std::strlen("ep_size_")));
  if (names.contains(files_say) || slots == 0 || experts % slots != 0) return check_all(by_files);
  const int by_slots = static_cast<int>(experts / slots);
  if (by_slots > by_files && names.empty())
    whole_.refuse(
        ErrorCode::kIncomplete,
        "Optimizer files of expert-parallel ranks are missing, or experts are frozen: the files "
        "do not tell which.",
        "expp_rank_*_optim_states.pt", std::to_string(by_slots) + " files",
        std::to_string(by_files), "bring them from the nodes that wrote them");
  return by_slots;
}

void Zero0Experts::check_ranks(const std::map<int, int>& optim_files) {
  for (const ExpertTensors::NativeLayer& layer : tensors_.layers()) {
    if (ranks_ > 0 && layer.experts.size() % static_cast<size_t>(ranks_) == 0) continue;
    whole_.refuse(ErrorCode::kMismatch, "The expert-parallel ranks do not share a layer's experts.",
                  quote(layer.path),
                  "a divisor of " + std::to_string(layer.experts.size()) + " experts",
                  std::to_string(ranks_) + " ranks",
                  "look which files expp_rank_*_optim_states.pt belong to this save");
  }
  if (ranks_ < 1 || whole_.topology.zero_ranks() % ranks_ != 0)
    whole_.refuse(ErrorCode::kMismatch, "The expert-parallel ranks do not divide the world.",
                  "expp_rank_*_optim_states.pt",
                  "a divisor of dp=" + std::to_string(whole_.topology.zero_ranks()),
                  std::to_string(ranks_) + " ranks", "look whether files of two saves are mixed");
  if (closed()) return;
  if (!optim_files.empty() && optim_files.rbegin()->first >= ranks_)
    whole_.refuse(
        ErrorCode::kMismatch,
        "The folder holds optimizer files of more expert-parallel ranks: two saves are mixed.",
        "expp_rank_" + std::to_string(optim_files.rbegin()->first), std::to_string(ranks_),
        std::to_string(optim_files.rbegin()->first + 1),
        "find out which save is the newer one; do not delete before");
  for (int rank = 0; rank < ranks_; ++rank) {
    if (!optim_files.contains(rank)) lose(rank);
  }
  if (static_cast<int>(lost_.size()) == ranks_)
    whole_.refuse(ErrorCode::kIncomplete, "No optimizer file of the checkpoint is there.",
                  "expp_rank_*_optim_states.pt", std::to_string(ranks_) + " files", "none",
                  "bring them from the nodes that wrote them");
}

void Zero0Experts::lose(int rank) {
  const std::string name = expert_optim_file_name(rank);
  if (rank == 0 && fields_.maybe(fields_.root(), "optimizer") != kNoNode) {
    whole_.notices.push_back(name + " is missing; the model file holds the same");
    return;
  }
  if (!options_.lost_experts)
    whole_.refuse(
        ErrorCode::kIncomplete,
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
  Zero0Rank result{.optimizer = {}, .experts = tensors_.blocks_of(rank, ranks_)};
  if (const auto file = optim_files.find(rank); file != optim_files.end()) {
    const Fields f(whole_.document(file->second));
    result.optimizer = {file->second, f.maybe(f.root(), "optimizer")};
  } else if (rank == 0) {
    result.optimizer = {model_.file, fields_.maybe(fields_.root(), "optimizer")};
  }
  return result;
}

MpPart Zero0Experts::read(const Zero0Rank& rank) {
  MpPart part = lend_files(&whole_, model_);
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
    whole_.parameters.push_back(parameter);
    whole_.enlist(static_cast<int>(whole_.parameters.size()) - 1);
  }
}

// What another optimizer says again must be equal: of parameters that the whole has, and of rank
// 0's stacks, which `own` has.
void Zero0Experts::add_again(const MpPart& part, const std::string& place, const MpPart* own) {
  ScalarTexts texts(whole_);
  const auto refuse_pair = [&](const std::string& entry, const std::string& expected,
                               const std::string& found) {
    whole_.refuse(ErrorCode::kMismatch,
                  "Optimizers of two expert-parallel ranks disagree: files of two saves are mixed.",
                  entry + ", " + place, expected, found, "put the files of one save together");
  };
  if (part.state.groups.empty()) return;  // it has no optimizer
  if (const std::string found = hyper_of(part); found != hyper_)
    refuse_pair("param_groups or loss scaler", hyper_.substr(0, 300), found.substr(0, 300));
  for (const ParameterState& again : part.state.parameters) {
    if (is_expert(again.name) && experts_.autoep() && !lost_.empty()) continue;  // weights alone
    const ParameterState* first = whole_.find_parameter(again.name);
    const bool stack = first != nullptr && first->shape != again.shape;
    if (stack) first = own == nullptr ? nullptr : own->state.find_parameter(again.name);
    if (first == nullptr || first->shape != again.shape || first->group < 0) continue;
    if (first->group != again.group)
      refuse_pair(quote(again.name), "group " + std::to_string(first->group),
                  "group " + std::to_string(again.group));
    const std::string expected = texts.of(first->scalars), found = texts.of(again.scalars);
    if (expected != found) refuse_pair(quote(again.name), expected, found);
    if (first->states.size() != again.states.size())
      refuse_pair(quote(again.name), std::to_string(first->states.size()) + " states",
                  std::to_string(again.states.size()));
    const auto pair = [&](int original, int copy) {
      Leaf leaf = part.state.leaf(copy);
      if (original < 0) refuse_pair(quote(again.name), "as in rank 0", quote(leaf.state));
      if (stack) original = whole_.add_leaf(own->state.leaf(original));
      leaf.state = place;
      whole_.replicas.emplace_back(original, whole_.add_leaf(std::move(leaf)));
    };
    pair(first->weight, again.weight);
    const ShardedState& holder = stack ? own->state : whole_;
    for (int copy : again.states)
      pair(holder.state_leaf(*first, part.state.leaf(copy).state), copy);
  }
}

// Hyper-parameters and loss scaler of one rank's optimizer.
std::string Zero0Experts::hyper_of(const MpPart& part) const {
  ShardedState bare;
  bare.flavour = Flavour::kZero0;
  bare.files = whole_.files;
  bare.optim_files = {part.state.groups.at(0).hyper.file};
  for (const GroupState& group : part.state.groups) bare.groups.push_back({group.hyper, {}, {}});
  return optimizer_json(bare).dump();
}

std::map<std::string, int> Zero0Experts::groups_by_local_name(const MpPart& part, int rank) const {
  std::map<std::string, int> groups;
  for (const ParameterState& parameter : part.state.parameters) {
    if (is_expert(parameter.name))
      groups[tensors_.local_name(parameter.name, rank, ranks_)] = parameter.group;
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
    const auto group = groups.find(tensors_.local_name(parameter.name, rank, ranks_));
    const int expected = group == groups.end() ? -1 : group->second;
    if (!lost && (parameter.group != expected || part->state.groups.size() != whole_.groups.size()))
      whole_.refuse(
          ErrorCode::kMismatch, "Expert-parallel ranks list their experts in other groups.",
          quote(parameter.name), "group " + std::to_string(expected),
          "group " + std::to_string(parameter.group), "put the files of one save together");
    if (lost) {
      parameter.group = expected;
      if (parameter.model_copy >= 0) parameter.weight = parameter.model_copy;
      parameter.model_copy = -1;
      parameter.states.clear();
      parameter.scalars.clear();
    }
    if (parameter.group < 0 && !closed())
      whole_.refuse(ErrorCode::kUnsupported,
                    "Experts that the optimizer does not train (frozen) are not supported yet.",
                    quote(parameter.name), "trained experts alone",
                    "one without a slot in the optimizer",
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
  Zero0Experts(state, model, experts, expert_files, options, storage).run(optim_files);
}

}  // namespace isoshard::checkpoint
