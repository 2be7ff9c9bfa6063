// See trainer.h.
#include "reference/trainer.h"

#include <algorithm>
#include <cmath>

#include "core/cast.h"
#include "core/check.h"
#include "core/numbers.h"

namespace isoshard::reference {
namespace {

// Tokens of one micro batch that a rank sends to experts: its lane's slice.
std::vector<LeafRange> lane_leaves(const DataConfig& data, const std::vector<int64_t>& places,
                                   Span positions, int lanes, int lane) {
  const int64_t each = positions.size();
  const Span tokens = lane_tokens(static_cast<int64_t>(places.size()) * each, lanes, lane);
  std::vector<LeafRange> ranges;
  for (size_t b = 0; b < places.size() && each > 0; ++b) {
    const int64_t at = static_cast<int64_t>(b) * each;
    const Span part{std::clamp(tokens.begin - at, int64_t{0}, each),
                    std::clamp(tokens.end - at, int64_t{0}, each)};
    if (part.size() <= 0) continue;
    for (const LeafRange& range : token_leaves(
             data, {places[b]}, {positions.begin + part.begin, positions.begin + part.end})) {
      ranges.push_back(range);
    }
  }
  return ranges;
}

std::vector<int64_t> all_places(const std::vector<std::vector<int64_t>>& micros) {
  std::vector<int64_t> places;
  for (const auto& micro : micros) places.insert(places.end(), micro.begin(), micro.end());
  return places;
}

}  // namespace

Trainer::Trainer(const TrainConfig& config, const ParallelState& parallel, LayoutCache* cache)
    : config_(config), parallel_(parallel), plan_(plan_batch(config.data, parallel.topology.data)) {
  check_model(config_.model, parallel_.topology);
  make_state();
  parameters_ = std::make_unique<Parameters>(config_.model, parallel_, &state_);
  make_owners(cache);
}

void Trainer::make_state() {
  const ModelConfig& model = config_.model;
  const Topology& t = parallel_.topology;
  state_.dtype = model.dtype;
  state_.stage = config_.stage;
  state_.pipeline_module = config_.pipeline_module || t.pipeline > 1;
  state_.loss_scale = config_.loss_scale;
  state_.counts_steps = counts_steps(config_.optimizer);
  state_.scheduled = config_.schedule.kind != ScheduleKind::kConstant;
  state_.clip = config_.clip;
  if (model.tied) state_.aliases.emplace_back("lm_head.weight", "model.embed_tokens.weight");
  state_.groups.push_back({.weight_decay = config_.optimizer.weight_decay});
  if (config_.split_decay) state_.groups.push_back({});
  if (model.experts > 0) {
    state_.groups.push_back({.weight_decay = config_.optimizer.weight_decay, .expert = true});
  }
  std::vector<TrainedGroup> appended(state_.groups.size());
  for (const ParameterInfo& info : parameters_of(model)) {
    if (!held_by_stage(model, info, t.pipeline, parallel_.at.pipeline)) continue;
    const Span shard = shard_of(model, info, t, parallel_.at.tensor, parallel_.at.expert);
    TrainedParameter p{
        .name = info.name,
        .module_name = state_.pipeline_module ? pipeline_name(model, info) : info.name,
        .shape = shard_shape(info, shard),
        .whole = info.shape,
        .expert = info.split == Split::kExpert};
    if (info.split != Split::kReplicated) {
      p.split_axis = info.split == Split::kRow ? 1 : 0;
      p.split_begin = shard.begin;
    }
    for (int rank = 0; rank < t.tensor && p.split_axis >= 0 && !p.expert; ++rank) {
      p.split_widths.push_back(shard_of(model, info, t, rank, parallel_.at.expert).size());
    }
    if (!info.trains) {
      p.group = -1;
      place_frozen(&p);
      state_.parameters.push_back(std::move(p));
      continue;
    }
    p.group = p.expert ? static_cast<int>(state_.groups.size()) - 1
                       : (config_.split_decay && !info.decays ? 1 : 0);
    (info.appended ? appended : state_.groups)[static_cast<size_t>(p.group)].parameters.push_back(
        static_cast<int>(state_.parameters.size()));
    state_.parameters.push_back(std::move(p));
  }
  for (size_t g = 0; g < appended.size(); ++g) {
    std::vector<int>& list = state_.groups[g].parameters;
    list.insert(list.end(), appended[g].parameters.begin(), appended[g].parameters.end());
  }
  for (TrainedGroup& group : state_.groups) group.settings = settings(group);
}

void Trainer::place_frozen(TrainedParameter* p) const {
  const int64_t count = numel(p->shape);
  int64_t size = count;
  if (state_.stage == 3) {  // as partition_parameters.py cuts every parameter
    const int64_t slot = div_ceil(count, parallel_.zero->size());
    p->values_begin = std::min(parallel_.zero->rank() * slot, count);
    size = std::min(slot, count - p->values_begin);
  }
  p->values.assign(static_cast<size_t>(size), 0.0f);
}

void Trainer::fill_frozen(
    const std::function<float(const TrainedParameter&, int64_t element)>& value_at) {
  for (TrainedParameter& p : state_.parameters) {
    if (!p.frozen()) continue;
    for (size_t i = 0; i < p.values.size(); ++i) {
      p.values[i] = value_at(p, whole_element(p, p.values_begin + static_cast<int64_t>(i)));
    }
  }
}

// The entries of param_groups as torch's optimizers have them, the rate of the next step first.
std::vector<std::pair<std::string, Setting>> Trainer::settings(const TrainedGroup& group) const {
  std::vector<std::pair<std::string, Setting>> all;
  if (config_.model.experts > 0) {  // deepspeed/moe/utils.py
    all.emplace_back("name", group.expert ? "ep_size_" + std::to_string(parallel_.topology.expert)
                                          : std::string("dense-params"));
    if (group.expert) all.emplace_back("moe", true);
  }
  for (auto& setting : optimizer_settings(group.weight_decay)) all.push_back(std::move(setting));
  return all;
}

std::vector<std::pair<std::string, Setting>> Trainer::optimizer_settings(
    double weight_decay) const {
  const OptimizerConfig& o = config_.optimizer;
  const double lr = learning_rate(config_.schedule, state_.counters.schedule_iteration);
  const std::vector<double> betas = {o.beta1, o.beta2};
  switch (o.kind) {
    case OptimizerKind::kAdamW:
      return {{"lr", lr},
              {"betas", betas},
              {"eps", o.epsilon},
              {"weight_decay", weight_decay},
              {"amsgrad", false},
              {"maximize", false},
              {"foreach", std::monostate{}},
              {"capturable", false},
              {"differentiable", false},
              {"fused", std::monostate{}},
              {"decoupled_weight_decay", true}};
    case OptimizerKind::kSgd:
      return {{"lr", lr},
              {"momentum", o.momentum},
              {"dampening", int64_t{0}},
              {"weight_decay", weight_decay},
              {"nesterov", false},
              {"maximize", false},
              {"foreach", std::monostate{}},
              {"differentiable", false},
              {"fused", std::monostate{}}};
    case OptimizerKind::kCustom:
      return {{"lr", lr}, {"weight_decay", weight_decay}};
    case OptimizerKind::kLion:
      break;
  }
  return {{"lr", lr}, {"betas", betas}, {"weight_decay", weight_decay}};
}

std::vector<TreeNode> Trainer::dense_nodes(const Coordinate& at) const {
  const std::vector<int64_t> places = all_places(plan_[static_cast<size_t>(at.data)]);
  return frontier(token_leaves(
      config_.data, places, positions_of(config_.data, parallel_.topology.sequence, at.sequence)));
}

// Of all tokens that may reach the experts of `rank`, each sender's apart: they come in turns.
std::vector<TreeNode> Trainer::expert_nodes(int rank) const {
  const Topology& t = parallel_.topology;
  std::vector<TreeNode> nodes;
  for (const int peer : group_of(t, GroupKind::kExpert, rank)) {
    const Coordinate at = coordinate_of(t, peer);
    std::vector<LeafRange> leaves;
    for (const std::vector<int64_t>& micro : plan_[static_cast<size_t>(at.data)]) {
      const std::vector<LeafRange> sent =
          lane_leaves(config_.data, micro, positions_of(config_.data, t.sequence, at.sequence),
                      t.tensor, at.tensor);
      leaves.insert(leaves.end(), sent.begin(), sent.end());
    }
    const std::vector<TreeNode> own = frontier(leaves);
    nodes.insert(nodes.end(), own.begin(), own.end());
  }
  std::sort(nodes.begin(), nodes.end(),
            [](const TreeNode& a, const TreeNode& b) { return a.first_leaf() < b.first_leaf(); });
  return nodes;
}

OwnerLayout Trainer::owner_layout(const TrainedGroup& group, const std::vector<int>& ranks) const {
  OwnerLayout layout;
  for (const int number : group.parameters) {
    layout.numels.push_back(numel(state_.parameters[static_cast<size_t>(number)].shape));
  }
  const int members = static_cast<int>(ranks.size());
  layout.cuts = cut_group(layout.numels, config_.stage, members);
  const std::vector<GroupCut> summed =
      config_.stage > 0 ? layout.cuts : cut_group(layout.numels, 3, members);
  layout.slices.assign(layout.numels.size(), std::vector<Span>(ranks.size()));
  for (size_t member = 0; member < ranks.size(); ++member) {
    layout.nodes.push_back(group.expert
                               ? expert_nodes(ranks[member])
                               : dense_nodes(coordinate_of(parallel_.topology, ranks[member])));
    for (const BufferPiece& piece : summed[member].pieces) {
      layout.slices[static_cast<size_t>(piece.parameter)][member] = {piece.begin,
                                                                     piece.begin + piece.count};
    }
  }
  return layout;
}

void Trainer::make_owners(LayoutCache* cache) {
  LayoutCache own_cache;
  if (cache == nullptr) cache = &own_cache;
  for (size_t g = 0; g < state_.groups.size(); ++g) {
    TrainedGroup& group = state_.groups[g];
    const std::vector<int> ranks =
        group_of(parallel_.topology, group.expert ? GroupKind::kExpertData : GroupKind::kZero,
                 parallel_.rank);
    std::shared_ptr<const OwnerLayout>& layout = (*cache)[{static_cast<int>(g), ranks}];
    if (!layout) layout = std::make_shared<const OwnerLayout>(owner_layout(group, ranks));
    owners_.push_back({group.expert ? parallel_.expert_data : parallel_.zero, layout});
    const GroupCut& own = layout->cuts[static_cast<size_t>(owners_.back().group->rank())];
    group.buffer_size = own.size;
    for (BufferPiece piece : own.pieces) {
      piece.parameter = group.parameters[static_cast<size_t>(piece.parameter)];
      group.pieces.push_back(piece);
    }
    group.master.assign(static_cast<size_t>(own.size), 0.0f);
    for (const std::string& name : state_names(config_.optimizer)) {
      group.states.emplace_back(name, std::vector<float>(static_cast<size_t>(own.size), 0.0f));
    }
  }
}

void Trainer::initialise() {
  const std::vector<ParameterInfo> infos = parameters_of(config_.model);
  fill_frozen([&](const TrainedParameter& p, int64_t element) {
    const auto info = std::ranges::find(infos, p.name, &ParameterInfo::name);
    return rounded_to(state_.dtype, InitialValues(config_.model, *info).at(element));
  });
  for (TrainedGroup& group : state_.groups) {
    for (const BufferPiece& piece : group.pieces) {
      const TrainedParameter& p = state_.parameters[static_cast<size_t>(piece.parameter)];
      const ParameterInfo& info = *std::find_if(infos.begin(), infos.end(),
                                                [&](const auto& i) { return i.name == p.name; });
      const InitialValues values(config_.model, info);
      for (int64_t i = 0; i < piece.count; ++i) {
        group.master[static_cast<size_t>(piece.at + i)] =
            rounded_to(state_.dtype, values.at(whole_element(p, piece.begin + i)));
      }
    }
  }
  refresh_parameters();
}

void Trainer::adopt(const WholeState& whole, const TrainingState& counted) {
  for (TrainedGroup& group : state_.groups) {
    for (const BufferPiece& piece : group.pieces) {
      const TrainedParameter& p = state_.parameters[static_cast<size_t>(piece.parameter)];
      const auto take = [&](const std::string& name, std::vector<float>* target) {
        const std::vector<float>& source = whole.at({p.name, name});
        for (int64_t i = 0; i < piece.count; ++i) {
          (*target)[static_cast<size_t>(piece.at + i)] =
              source[static_cast<size_t>(whole_element(p, piece.begin + i))];
        }
      };
      take("fp32", &group.master);
      for (auto& [name, values] : group.states) take(name, &values);
    }
  }
  fill_frozen([&](const TrainedParameter& p, int64_t element) {
    return whole.at({p.name, "param"})[static_cast<size_t>(element)];
  });
  state_.counters = counted.counters;
  state_.loss_scale = counted.loss_scale;
  state_.fixed_largest = counted.fixed_largest;
  for (TrainedGroup& group : state_.groups) group.settings = settings(group);
  refresh_parameters();
}

void Trainer::refresh_parameters() {
  if (state_.stage == 3) return;
  for (size_t g = 0; g < state_.groups.size(); ++g) {
    const TrainedGroup& group = state_.groups[g];
    const Owners& owners = owners_[g];
    Values own(group.master.size());
    for (size_t i = 0; i < own.size(); ++i) own[i] = rounded_to(state_.dtype, group.master[i]);
    for (const int number : group.parameters) {
      TrainedParameter& p = state_.parameters[static_cast<size_t>(number)];
      p.values.resize(static_cast<size_t>(numel(p.shape)));
    }
    const auto take = [&](const std::vector<BufferPiece>& pieces, const float* values) {
      for (const BufferPiece& piece : pieces) {  // `parameter` counts within the group
        TrainedParameter& p = state_.parameters[static_cast<size_t>(
            group.parameters[static_cast<size_t>(piece.parameter)])];
        std::copy_n(values + piece.at, piece.count, p.values.begin() + piece.begin);
      }
    };
    const std::vector<GroupCut>& cuts = owners.layout->cuts;
    if (state_.stage == 0) {  // everybody has everything
      take(cuts[static_cast<size_t>(owners.group->rank())].pieces, own.data());
      continue;
    }
    const Values all = parameters_->gather(*owners.group, own);
    CHECK(all.size() == cuts.size() * own.size(), "a partition from each of those who share it");
    for (size_t member = 0; member < cuts.size(); ++member) {
      take(cuts[member].pieces, all.data() + member * own.size());
    }
  }
}

}  // namespace isoshard::reference
