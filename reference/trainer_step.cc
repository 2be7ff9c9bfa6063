// A step of a rank, from the batch to the stepped masters. See trainer.h.
#include <algorithm>
#include <cmath>

#include "core/cast.h"
#include "core/check.h"
#include "core/mutant.h"
#include "reference/trainer.h"

namespace isoshard::reference {

MicroBatch Trainer::micro_batch(const std::vector<int64_t>& places) const {
  MicroBatch micro{.places = places};
  for (const int64_t place : places) micro.samples.push_back(state_.counters.samples + place);
  return micro;
}

const std::vector<TreeNode>& Trainer::own_nodes(int group) const {
  const Owners& owners = owners_[static_cast<size_t>(group)];
  return owners.layout->nodes[static_cast<size_t>(owners.group->rank())];
}

GradientSet Trainer::empty_gradients() const {
  GradientSet set;
  set.own.resize(static_cast<size_t>(parameters_->count()));
  for (int i = 0; i < parameters_->count(); ++i) {
    const LocalParameter& local = parameters_->local(i);
    if (local.state < 0) continue;
    const bool by_row = local.info.layer < 0 || local.info.split == Split::kExpert;
    const int64_t rows = by_row ? local.shape[0] : 1;
    const int64_t width = numel(local.shape) / std::max<int64_t>(rows, 1);
    const int group = state_.parameters[static_cast<size_t>(local.state)].group;
    set.own[static_cast<size_t>(i)].emplace(  // a frozen one's are not reduced
        config_.reduce, own_nodes(std::max(group, 0)), rows, width);
  }
  if (config_.model.tied && parallel_.last_stage()) {
    set.head.emplace(config_.reduce, own_nodes(0), 1,
                     config_.model.vocabulary * config_.model.hidden);
  }
  return set;
}

void Trainer::run_model(Transformer* model, GradientSet* gradients) {
  const auto& micros = plan_[static_cast<size_t>(parallel_.at.data)];
  const bool at_once = parallel_.topology.pipeline > 1 || config_.reduce == ReduceMode::kFixed;
  for (size_t i = 0; i < micros.size(); ++i) {
    model->forward(micro_batch(micros[i]), state_.counters.steps);
    if (!at_once) model->backward(i, gradients);
  }
  if (config_.reduce == ReduceMode::kFixed)
    run_in_fixed_point(model, gradients);
  else if (at_once)
    run_backward(model, gradients);
}

void Trainer::run_backward(Transformer* model, GradientSet* gradients) {
  const size_t micros = plan_[static_cast<size_t>(parallel_.at.data)].size();
  for (size_t i = 0; i < micros; ++i) model->backward(i, gradients);
}

// First and last stage hand each other their half of the tied embedding's gradient.
void Trainer::exchange_tied(Contribution* lookup, Contribution* head) {
  if (parallel_.topology.pipeline == 1 || !(parallel_.first_stage() || parallel_.last_stage())) {
    return;
  }
  const int64_t v = config_.model.vocabulary, h = config_.model.hidden;
  const std::vector<TreeNode>& nodes = own_nodes(0);
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
  } else {
    *lookup = shaped(v, h);
    receive(lookup, 0);
    send(*head, 0);
  }
}

// The last root is the head's: lookup + head, in that order, at every pp.
void Trainer::add_head(int tied, std::vector<Values>* roots) {
  const Values head = std::move(roots->back());
  roots->pop_back();
  Values& sum = (*roots)[static_cast<size_t>(tied)];
  for (size_t i = 0; i < sum.size() && !mutant("head_gradient_lost"); ++i) sum[i] += head[i];
}

// By group and parameter: the roots of this rank's slices.
std::vector<std::vector<Values>> Trainer::reduce(GradientSet* gradients) {
  Contribution lookup, head;
  const int embedding = parameters_->find("model.embed_tokens.weight");
  if (config_.model.tied) {
    if (parallel_.first_stage()) {
      lookup = gradients->own[static_cast<size_t>(embedding)]->finish();
    }
    if (parallel_.last_stage()) head = gradients->head->finish();
    exchange_tied(&lookup, &head);
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
      items.push_back({&parts[k], gradient.rows(), gradient.width(), &owners.layout->slices[k]});
    }
    if (tied >= 0) {
      items.push_back({&head, 1, config_.model.vocabulary * config_.model.hidden,
                       &owners.layout->slices[static_cast<size_t>(tied)]});
    }
    std::vector<Values> group_roots = reduce_to_owners(*owners.group, owners.layout->nodes, items);
    if (tied >= 0) add_head(tied, &group_roots);
    roots.push_back(std::move(group_roots));
  }
  return roots;
}

// A group of one sends nothing.
void Trainer::sum_over(Communicator& group, std::vector<int64_t>* words) {
  if (group.size() > 1) group.all_reduce(buffer(std::span(*words)), Reduction::kSum);
}

void Trainer::total_loss(const LossSum& loss, std::initializer_list<Communicator*> groups,
                         StepReport* report) {
  std::vector<int64_t> words(loss.sum.words().begin(), loss.sum.words().end());
  words.push_back(loss.tokens);
  for (Communicator* group : groups) {
    if (!mutant("loss_of_own_rank")) sum_over(*group, &words);
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
        value = rounded_to(state_.dtype, value * factor);
        if (!std::isfinite(value)) overflow = 1;
        if ((!shared || mutant("norm_counts_replicas")) && !tied_copy) squares.add_square(value);
      }
    }
  }
  std::vector<int64_t> words(squares.words().begin(), squares.words().end());
  sum_over(*parallel_.world, &words);
  if (parallel_.world->size() > 1 && !mutant("overflow_of_own_rank")) {
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
        Values all(static_cast<size_t>(owners.layout->numels[k]));
        for (const Span& slice : owners.layout->slices[k]) {
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
  for (TrainedGroup& group : state_.groups) group.settings = settings(group);
  refresh_parameters();
}

StepReport Trainer::step() {
  StepReport report;
  Transformer model(config_.model, config_.data, parallel_, parameters_.get());
  GradientSet gradients = empty_gradients();
  run_model(&model, &gradients);
  total_loss(model.loss(), {parallel_.world}, &report);
  std::vector<std::vector<Values>> roots =
      config_.reduce == ReduceMode::kFixed ? reduce_in_fixed_point(&gradients) : reduce(&gradients);
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

StepReport Trainer::evaluate(int64_t first, int64_t count, std::optional<int64_t> length) {
  StepReport report;
  DataConfig data = config_.data;
  data.sequence_length = length.value_or(data.sequence_length);
  const UlyssesMode mode{.training = false, .disable_in_eval = config_.disable_in_eval};
  const bool bypass = mode.bypass();
  Transformer model(config_.model, data, parallel_, parameters_.get(), mode);
  MicroBatch micro;
  for (int64_t i = 0; i < count; ++i) {
    // Without the bypass the samples are shared out over dp, the first ranks having one more.
    if (!bypass && i % parallel_.topology.data != parallel_.at.data) continue;
    micro.samples.push_back(first + i);
    micro.places.push_back(i);
  }
  model.forward(micro, -1);
  // In the bypass a rank's samples are its own, and their loss on its last stage.
  if (bypass)
    total_loss(model.loss(), {parallel_.tensor, parallel_.pipeline}, &report);
  else
    total_loss(model.loss(), {parallel_.world}, &report);
  return report;
}

}  // namespace isoshard::reference
