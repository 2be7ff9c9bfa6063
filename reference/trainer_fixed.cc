// Gradients in fixed point: exponents from the step before, where it left them, and a second
// backward pass where they do not fit. Every rank takes the same decision. See trainer.h.
#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "reference/trainer.h"

namespace isoshard::reference {

std::vector<std::pair<std::string, FixedSum*>> Trainer::fixed_sums(GradientSet* gradients) const {
  std::vector<std::pair<std::string, FixedSum*>> sums;
  for (int i = 0; i < parameters_->count(); ++i) {
    std::optional<Gradient>& gradient = gradients->own[static_cast<size_t>(i)];
    sums.emplace_back(parameters_->local(i).info.name, gradient ? &gradient->fixed() : nullptr);
  }
  if (config_.model.tied) {
    sums.emplace_back("head of model.embed_tokens.weight",
                      gradients->head ? &gradients->head->fixed() : nullptr);
  }
  return sums;
}

// Agrees on the largest summand of every tensor and records it; false if a sum was saturated.
bool Trainer::settle_exponents(GradientSet* gradients) {
  std::vector<float> most;
  float saturated = 0;
  const auto sums = fixed_sums(gradients);
  for (const auto& [name, sum] : sums) {
    if (sum != nullptr) sum->settle();
    most.push_back(sum == nullptr ? 0.0f : sum->largest());
    if (sum != nullptr && sum->saturated()) saturated = 1;
  }
  most.push_back(saturated);
  if (parallel_.world->size() > 1) {
    parallel_.world->all_reduce(buffer(std::span(most)), Reduction::kMax);
  }
  state_.fixed_largest.clear();
  for (size_t i = 0; i < sums.size(); ++i) {
    state_.fixed_largest.emplace_back(sums[i].first, most[i]);
  }
  return most.back() == 0;
}

void Trainer::run_in_fixed_point(Transformer* model, GradientSet* gradients) {
  const int64_t leaves = std::max<int64_t>(2, config_.data.batch * config_.data.sequence_length);
  const auto restart = [&] {
    bool known = true;
    for (const auto& [name, sum] : fixed_sums(gradients)) {
      const auto found = std::find_if(state_.fixed_largest.begin(), state_.fixed_largest.end(),
                                      [&](const auto& entry) { return entry.first == name; });
      const bool there = found != state_.fixed_largest.end();
      const float largest = there ? found->second : 0.0f;
      const bool usable = std::isfinite(largest) && largest > 0;
      known &= usable;
      if (sum == nullptr) continue;
      sum->restart(usable ? FixedSum::exponent_for(leaves, largest) : 0, leaves);
    }
    return known;
  };
  const bool known = restart();
  run_backward(model, gradients);
  if (settle_exponents(gradients) && known) return;
  restart();
  run_backward(model, gradients);
  settle_exponents(gradients);
}

std::vector<std::vector<Values>> Trainer::reduce_in_fixed_point(GradientSet* gradients) {
  const int embedding = parameters_->find("model.embed_tokens.weight");
  const bool tied = config_.model.tied;
  const int64_t numel = config_.model.vocabulary * config_.model.hidden;
  FixedSum other(numel);  // of the stage that has the other half of a tied embedding
  FixedSum *lookup = nullptr, *head = nullptr;
  if (tied && parallel_.first_stage()) {
    lookup = &gradients->own[static_cast<size_t>(embedding)]->fixed();
  }
  if (tied && parallel_.last_stage()) head = &gradients->head->fixed();
  if ((lookup == nullptr) != (head == nullptr)) {
    const bool first = lookup != nullptr;
    other = exchange_fixed(first ? *lookup : *head, first);
    (first ? head : lookup) = &other;
  }
  std::vector<std::vector<Values>> roots;
  for (size_t g = 0; g < state_.groups.size(); ++g) {
    const Owners& owners = owners_[g];
    std::vector<FixedItem> items;
    int tied_at = -1;
    for (size_t k = 0; k < state_.groups[g].parameters.size(); ++k) {
      const int member = state_.groups[g].parameters[k];
      const int number = parameters_->find(state_.parameters[static_cast<size_t>(member)].name);
      const bool shared = tied && number == embedding;
      if (shared) tied_at = static_cast<int>(k);
      items.push_back({shared ? lookup : &gradients->own[static_cast<size_t>(number)]->fixed(),
                       &owners.layout->slices[k]});
    }
    if (tied_at >= 0) items.push_back({head, &owners.layout->slices[static_cast<size_t>(tied_at)]});
    std::vector<Values> group_roots = reduce_fixed(*owners.group, items);
    if (tied_at >= 0) add_head(tied_at, &group_roots);
    roots.push_back(std::move(group_roots));
  }
  // A summand that is not a number has no fixed point: all of its tensor is none then.
  for (size_t g = 0; g < roots.size(); ++g) {
    for (size_t k = 0; k < roots[g].size(); ++k) {
      const std::string& name =
          state_.parameters[static_cast<size_t>(state_.groups[g].parameters[k])].name;
      for (const auto& [tensor, largest] : state_.fixed_largest) {
        if ((tensor != name && tensor != "head of " + name) || std::isfinite(largest)) continue;
        std::fill(roots[g][k].begin(), roots[g][k].end(), std::numeric_limits<float>::quiet_NaN());
      }
    }
  }
  return roots;
}

// First and last stage hand each other their half of a tied embedding's sum.
FixedSum Trainer::exchange_fixed(const FixedSum& own, bool first) {
  std::vector<int64_t> words = own.sums();
  words.push_back(own.exponent());
  std::vector<int64_t> theirs(words.size());
  const int peer = first ? parallel_.topology.pipeline - 1 : 0;
  Communicator& group = *parallel_.pipeline;
  if (first) group.send(const_buffer(std::span<const int64_t>(words)), peer);
  group.receive(buffer(std::span(theirs)), peer);
  if (!first) group.send(const_buffer(std::span<const int64_t>(words)), peer);
  FixedSum other(static_cast<int64_t>(own.sums().size()));
  const int exponent = static_cast<int>(theirs.back());
  theirs.pop_back();
  other.take(theirs, exponent);
  return other;
}

}  // namespace isoshard::reference
