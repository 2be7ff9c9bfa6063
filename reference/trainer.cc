// See trainer.h.
#include "reference/trainer.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"

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

Trainer::Trainer(const TrainConfig& config, const ParallelState& parallel)
    : config_(config), parallel_(parallel), plan_(plan_batch(config.data, parallel.topology.data)) {
  check_model(config_.model, parallel_.topology);
  make_state();
  parameters_ = std::make_unique<Parameters>(config_.model, parallel_, &state_);
  make_owners();
}

void Trainer::make_state() {
  const ModelConfig& model = config_.model;
  const Topology& t = parallel_.topology;
  state_.dtype = model.dtype;
  state_.stage = config_.stage;
  state_.loss_scale = config_.loss_scale;
  state_.counts_steps = counts_steps(config_.optimizer.kind);
  state_.scheduled = config_.schedule.kind != ScheduleKind::kConstant;
  state_.clip = config_.clip;
  if (model.tied) state_.aliases.emplace_back("lm_head.weight", "model.embed_tokens.weight");
  state_.groups.push_back({.name = "dense", .weight_decay = config_.optimizer.weight_decay});
  if (config_.split_decay) state_.groups.push_back({.name = "norms"});
  if (model.experts > 0) {
    state_.groups.push_back(
        {.name = "experts", .weight_decay = config_.optimizer.weight_decay, .expert = true});
  }
  for (const ParameterInfo& info : parameters_of(model)) {
    if (!held_by_stage(model, info, t.pipeline, parallel_.at.pipeline)) continue;
    const Span shard = shard_of(model, info, t, parallel_.at.tensor, parallel_.at.expert);
    TrainedParameter p{.name = info.name,
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
    p.group = p.expert ? static_cast<int>(state_.groups.size()) - 1
                       : (config_.split_decay && !info.decays ? 1 : 0);
    state_.groups[static_cast<size_t>(p.group)].parameters.push_back(
        static_cast<int>(state_.parameters.size()));
    state_.parameters.push_back(std::move(p));
  }
  for (TrainedGroup& group : state_.groups) group.settings = settings(group.weight_decay);
}

// The entries of param_groups as torch's optimizers have them, the rate of the next step first.
std::vector<std::pair<std::string, Setting>> Trainer::settings(double weight_decay) const {
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
      for (const LeafRange& range :
           lane_leaves(config_.data, micro, positions_of(config_.data, t.sequence, at.sequence),
                       t.tensor, at.tensor)) {
        leaves.push_back(range);
      }
    }
    for (const TreeNode& node : frontier(leaves)) nodes.push_back(node);
  }
  std::sort(nodes.begin(), nodes.end(),
            [](const TreeNode& a, const TreeNode& b) { return a.first_leaf() < b.first_leaf(); });
  return nodes;
}

void Trainer::make_owners() {
  const Topology& t = parallel_.topology;
  for (TrainedGroup& group : state_.groups) {
    Owners owners;
    owners.group = group.expert ? parallel_.expert_data : parallel_.zero;
    const std::vector<int> ranks =
        group_of(t, group.expert ? GroupKind::kExpertData : GroupKind::kZero, parallel_.rank);
    for (const int number : group.parameters) {
      owners.numels.push_back(numel(state_.parameters[static_cast<size_t>(number)].shape));
    }
    owners.slices.resize(owners.numels.size());
    for (size_t member = 0; member < ranks.size(); ++member) {
      owners.nodes.push_back(group.expert ? expert_nodes(ranks[member])
                                          : dense_nodes(coordinate_of(t, ranks[member])));
      const ZeroForm form{config_.stage, static_cast<int>(ranks.size()), static_cast<int>(member)};
      owners.cuts.push_back(cut_group(owners.numels, form));
      const GroupCut summed = config_.stage > 0
                                  ? owners.cuts.back()
                                  : cut_group(owners.numels, {3, form.ranks, form.rank});
      for (std::vector<Span>& list : owners.slices) list.push_back({0, 0});
      for (const BufferPiece& piece : summed.pieces) {
        owners.slices[static_cast<size_t>(piece.parameter)].back() = {piece.begin,
                                                                      piece.begin + piece.count};
      }
    }
    const GroupCut& own = owners.cuts[static_cast<size_t>(owners.group->rank())];
    group.buffer_size = own.size;
    for (BufferPiece piece : own.pieces) {
      piece.parameter = group.parameters[static_cast<size_t>(piece.parameter)];
      group.pieces.push_back(piece);
    }
    group.master.assign(static_cast<size_t>(own.size), 0.0f);
    for (const std::string& name : state_names(config_.optimizer.kind)) {
      group.states.emplace_back(name, std::vector<float>(static_cast<size_t>(own.size), 0.0f));
    }
    owners_.push_back(std::move(owners));
  }
}

void Trainer::initialise() {
  const std::vector<ParameterInfo> infos = parameters_of(config_.model);
  for (TrainedGroup& group : state_.groups) {
    for (const BufferPiece& piece : group.pieces) {
      const TrainedParameter& p = state_.parameters[static_cast<size_t>(piece.parameter)];
      const ParameterInfo& info = *std::find_if(infos.begin(), infos.end(),
                                                [&](const auto& i) { return i.name == p.name; });
      for (int64_t i = 0; i < piece.count; ++i) {
        group.master[static_cast<size_t>(piece.at + i)] = rounded(
            initial_value(config_.model, info, whole_element(p, piece.begin + i)), state_.dtype);
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
  state_.counters = counted.counters;
  state_.loss_scale = counted.loss_scale;
  for (TrainedGroup& group : state_.groups) group.settings = settings(group.weight_decay);
  refresh_parameters();
}

void Trainer::refresh_parameters() {
  if (state_.stage == 3) return;
  for (size_t g = 0; g < state_.groups.size(); ++g) {
    const TrainedGroup& group = state_.groups[g];
    const Owners& owners = owners_[g];
    Values own(group.master.size());
    for (size_t i = 0; i < own.size(); ++i) own[i] = rounded(group.master[i], state_.dtype);
    std::vector<Values> all;
    for (const GroupCut& cut : owners.cuts) all.emplace_back(static_cast<size_t>(cut.size));
    if (state_.stage == 0)
      all[static_cast<size_t>(owners.group->rank())] = own;
    else
      parameters_->gather(*owners.group, own, &all);
    for (const int number : group.parameters) {
      TrainedParameter& p = state_.parameters[static_cast<size_t>(number)];
      p.values.assign(static_cast<size_t>(numel(p.shape)), 0.0f);
    }
    for (size_t member = 0; member < all.size(); ++member) {
      if (state_.stage == 0 && static_cast<int>(member) != owners.group->rank()) continue;
      for (const BufferPiece& piece : owners.cuts[member].pieces) {
        TrainedParameter& p = state_.parameters[static_cast<size_t>(
            group.parameters[static_cast<size_t>(piece.parameter)])];
        std::copy_n(all[member].begin() + piece.at, piece.count, p.values.begin() + piece.begin);
      }
    }
  }
}

MicroBatch Trainer::micro_batch(const std::vector<int64_t>& places) const {
  MicroBatch micro{.places = places};
  for (const int64_t place : places) micro.samples.push_back(state_.counters.samples + place);
  return micro;
}

GradientSet Trainer::empty_gradients() const {
  GradientSet set;
  const std::vector<TreeNode> dense = dense_nodes(parallel_.at);
  const std::vector<TreeNode> expert =
      config_.model.experts > 0 ? expert_nodes(parallel_.rank) : std::vector<TreeNode>();
  set.own.resize(static_cast<size_t>(parameters_->count()));
  for (int i = 0; i < parameters_->count(); ++i) {
    const LocalParameter& local = parameters_->local(i);
    if (local.state < 0) continue;
    const bool by_row = local.info.layer < 0 || local.info.split == Split::kExpert;
    const int64_t rows = by_row ? local.shape[0] : 1;
    const int64_t width = numel(local.shape) / std::max<int64_t>(rows, 1);
    set.own[static_cast<size_t>(i)].emplace(local.info.split == Split::kExpert ? expert : dense,
                                            rows, width);
  }
  if (config_.model.tied && parallel_.last_stage()) {
    set.head.emplace(dense, 1, config_.model.vocabulary * config_.model.hidden);
  }
  return set;
}

void Trainer::run_model(Transformer* model, GradientSet* gradients) {
  const auto& micros = plan_[static_cast<size_t>(parallel_.at.data)];
  const bool at_once = parallel_.topology.pipeline > 1;
  for (size_t i = 0; i < micros.size(); ++i) {
    model->forward(micro_batch(micros[i]), state_.counters.steps);
    if (!at_once) model->backward(i, gradients);
  }
  for (size_t i = 0; at_once && i < micros.size(); ++i) model->backward(i, gradients);
}

// First and last stage hand each other their half of the tied embedding's gradient.
void Trainer::exchange_tied(Contribution* lookup, Contribution* head, bool* has_lookup,
                            bool* has_head) {
  if (parallel_.topology.pipeline == 1 || !(parallel_.first_stage() || parallel_.last_stage())) {
    return;
  }
  const int64_t v = config_.model.vocabulary, h = config_.model.hidden;
  const std::vector<TreeNode> nodes = dense_nodes(parallel_.at);
  const auto shaped = [&](int64_t rows, int64_t width) {
    Partial empty{.nodes = nodes,
                  .present = std::vector<uint8_t>(nodes.size()),
                  .values = Values(nodes.size() * static_cast<size_t>(width))};
    return Contribution(static_cast<size_t>(rows), empty);
  };
  const auto send = [&](const Contribution& part, int to) {
    for (const Partial& row : part) {
      parallel_.pipeline->send(const_buffer(std::span<const uint8_t>(row.present)), to);
      parallel_.pipeline->send(const_buffer(std::span<const float>(row.values)), to);
    }
  };
  const auto receive = [&](Contribution* part, int from) {
    for (Partial& row : *part) {
      parallel_.pipeline->receive(buffer(std::span(row.present)), from);
      parallel_.pipeline->receive(buffer(std::span(row.values)), from);
    }
  };
  const int last = parallel_.topology.pipeline - 1;
  if (parallel_.first_stage()) {
    *head = shaped(1, v * h);
    send(*lookup, last);
    receive(head, last);
    *has_head = true;
  } else {
    *lookup = shaped(v, h);
    receive(lookup, 0);
    send(*head, 0);
    *has_lookup = true;
  }
}

// By group and parameter: the roots of this rank's slices.
std::vector<std::vector<Values>> Trainer::reduce(GradientSet* gradients) {
  Contribution lookup, head;
  bool has_lookup = false, has_head = false;
  const int embedding = parameters_->find("model.embed_tokens.weight");
  if (config_.model.tied) {
    if (parallel_.first_stage()) {
      lookup = gradients->own[static_cast<size_t>(embedding)]->finish();
      has_lookup = true;
    }
    if (parallel_.last_stage()) {
      head = gradients->head->finish();
      has_head = true;
    }
    exchange_tied(&lookup, &head, &has_lookup, &has_head);
  }
  std::vector<std::vector<Values>> roots;
  for (size_t g = 0; g < state_.groups.size(); ++g) {
    const Owners& owners = owners_[g];
    const std::vector<int>& members = state_.groups[g].parameters;
    std::vector<Contribution> parts(members.size());
    std::vector<ReduceItem> items;
    int tied = -1;
    for (size_t k = 0; k < members.size(); ++k) {
      const std::string& name = state_.parameters[static_cast<size_t>(members[k])].name;
      const int number = parameters_->find(name);
      Gradient& gradient = *gradients->own[static_cast<size_t>(number)];
      if (number == embedding && config_.model.tied) {
        tied = static_cast<int>(k);
        parts[k] = std::move(lookup);
      } else {
        parts[k] = gradient.finish();
      }
      items.push_back({&parts[k], gradient.rows(), gradient.width(), owners.slices[k]});
    }
    if (tied >= 0) {
      items.push_back({&head, 1, config_.model.vocabulary * config_.model.hidden,
                       owners.slices[static_cast<size_t>(tied)]});
    }
    std::vector<Values> group_roots = reduce_to_owners(*owners.group, owners.nodes, items);
    if (tied >= 0) {  // tree(lookup) + tree(head), in that order, at every pp
      Values& sum = group_roots[static_cast<size_t>(tied)];
      for (size_t i = 0; i < sum.size(); ++i) sum[i] += group_roots.back()[i];
      group_roots.pop_back();
    }
    roots.push_back(std::move(group_roots));
  }
  return roots;
}

void Trainer::total_loss(const LossSum& loss, StepReport* report) {
  std::vector<int64_t> words(loss.sum.words().begin(), loss.sum.words().end());
  words.push_back(loss.tokens);
  if (parallel_.world->size() > 1) {
    parallel_.world->all_reduce(buffer(std::span(words)), Reduction::kSum);
  }
  report->tokens = words.back();
  words.pop_back();
  const double total = ExactSum::from_words(words).value();
  report->loss =
      static_cast<float>(total / static_cast<double>(std::max<int64_t>(1, report->tokens)));
}

// Scales, rounds, measures and clips; false where float16 overflowed.
bool Trainer::finish_gradients(std::vector<std::vector<Values>>* roots, StepReport* report) {
  const double tokens = static_cast<double>(std::max<int64_t>(1, report->tokens));
  const float factor = static_cast<float>(state_.loss_scale.scale / tokens);
  ExactSum squares;
  uint8_t overflow = 0;
  for (size_t g = 0; g < roots->size(); ++g) {
    for (size_t k = 0; k < (*roots)[g].size(); ++k) {
      const TrainedParameter& p =
          state_.parameters[static_cast<size_t>(state_.groups[g].parameters[k])];
      // A replica is counted where its first tensor-parallel rank and stage are.
      const bool shared = p.split_axis < 0 && parallel_.at.tensor > 0;
      const bool tied_copy =
          config_.model.tied && p.name == "model.embed_tokens.weight" && !parallel_.first_stage();
      for (float& value : (*roots)[g][k]) {
        value = rounded(value * factor, state_.dtype);
        if (!std::isfinite(value)) overflow = 1;
        if (!shared && !tied_copy) squares.add_square(value);
      }
    }
  }
  std::vector<int64_t> words(squares.words().begin(), squares.words().end());
  if (parallel_.world->size() > 1) {
    parallel_.world->all_reduce(buffer(std::span(words)), Reduction::kSum);
    parallel_.world->all_reduce(buffer(std::span(&overflow, 1)), Reduction::kMax);
  }
  report->norm = std::sqrt(ExactSum::from_words(words).value()) / state_.loss_scale.scale;
  if (state_.dtype == DType::kFloat16 && overflow != 0) return false;
  double combined = state_.loss_scale.scale;
  if (config_.clip > 0) {
    const double over = (report->norm + 1e-6) / config_.clip;
    if (over > 1) combined *= over;
  }
  const float inverse = static_cast<float>(1.0 / combined);
  for (std::vector<Values>& group : *roots) {
    for (Values& values : group) {
      for (float& value : values) value *= inverse;
    }
  }
  return true;
}

void Trainer::update(const std::vector<std::vector<Values>>& gradients) {
  const double lr = learning_rate(config_.schedule, state_.counters.schedule_iteration);
  for (size_t g = 0; g < state_.groups.size(); ++g) {
    TrainedGroup& group = state_.groups[g];
    const Owners& owners = owners_[g];
    std::vector<Values> whole = gradients[g];
    if (config_.stage == 0 && owners.group->size() > 1) {  // everybody needs everything
      for (size_t k = 0; k < whole.size(); ++k) {
        std::vector<Buffer> targets;
        Values all(static_cast<size_t>(owners.numels[k]));
        for (const Span& slice : owners.slices[k]) {
          targets.push_back(buffer(std::span(all).subspan(static_cast<size_t>(slice.begin),
                                                          static_cast<size_t>(slice.size()))));
        }
        owners.group->all_gather(const_buffer(std::span<const float>(whole[k])), targets);
        whole[k] = std::move(all);
      }
    }
    for (const BufferPiece& piece : group.pieces) {
      const size_t k = static_cast<size_t>(
          std::find(group.parameters.begin(), group.parameters.end(), piece.parameter) -
          group.parameters.begin());
      CHECK(static_cast<int64_t>(whole[k].size()) == piece.count, "a gradient for each element");
      const size_t at = static_cast<size_t>(piece.at), count = static_cast<size_t>(piece.count);
      StepArguments arguments{.master = std::span(group.master).subspan(at, count),
                              .gradient = whole[k],
                              .states = {},
                              .step = state_.counters.optimizer_steps + 1,
                              .lr = lr,
                              .weight_decay = group.weight_decay};
      for (auto& [name, values] : group.states) {
        arguments.states.push_back(std::span(values).subspan(at, count));
      }
      take_step(config_.optimizer, arguments);
    }
  }
  ++state_.counters.optimizer_steps;
  ++state_.counters.schedule_iteration;
  for (TrainedGroup& group : state_.groups) group.settings = settings(group.weight_decay);
  refresh_parameters();
}

StepReport Trainer::step() {
  StepReport report;
  Transformer model(config_.model, config_.data, parallel_, parameters_.get());
  GradientSet gradients = empty_gradients();
  run_model(&model, &gradients);
  total_loss(model.loss(), &report);
  std::vector<std::vector<Values>> roots = reduce(&gradients);
  report.skipped = !finish_gradients(&roots, &report);
  if (report.skipped)
    ++state_.counters.skipped_steps;
  else
    update(roots);
  update_scale(&state_.loss_scale, report.skipped);
  ++state_.counters.steps;
  state_.counters.samples += config_.data.batch;
  return report;
}

StepReport Trainer::evaluate(int64_t first, int64_t count) {
  StepReport report;
  const bool bypass = config_.disable_in_eval;
  Transformer model(config_.model, config_.data, parallel_, parameters_.get(), bypass);
  MicroBatch micro;
  for (int64_t i = 0; i < count; ++i) {
    // Without the bypass the samples are shared out over dp, the first ranks having one more.
    if (!bypass && i % parallel_.topology.data != parallel_.at.data) continue;
    micro.samples.push_back(first + i);
    micro.places.push_back(i);
  }
  model.forward(micro, -1);
  if (!bypass) {
    total_loss(model.loss(), &report);
    return report;
  }
  report.tokens = model.loss().tokens;
  report.loss = static_cast<float>(model.loss().sum.value() /
                                   static_cast<double>(std::max<int64_t>(1, report.tokens)));
  return report;
}

}  // namespace isoshard::reference
