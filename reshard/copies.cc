// See copies.h.
#include "reshard/copies.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <optional>

#include "checkpoint/cancel.h"
#include "core/cast.h"
#include "core/error.h"
#include "core/mutant.h"
#include "reshard/parallel.h"
#include "reshard/statistics.h"
#include "reshard/tensor_values.h"

namespace isoshard::reshard {
namespace {

using checkpoint::FileFragment;
using checkpoint::Leaf;
using checkpoint::ShardedState;

constexpr int64_t kStepBytes = 1 << 20;

bool same_bytes(const Leaf& a, const Leaf& b) {
  return a.dtype == b.dtype && std::ranges::equal(a.fragments, b.fragments,
                                                  [](const FileFragment& x, const FileFragment& y) {
                                                    return x.begin == y.begin &&
                                                           x.count == y.count && x.file == y.file &&
                                                           x.offset_bytes == y.offset_bytes;
                                                  });
}

std::string describe(DType dtype, std::span<const std::byte> element) {
  const std::string bits = element_bits(element);
  return has_values(dtype) ? bits + " (" + element_text(dtype, element) + ")" : bits;
}

bool is_nan(DType dtype, std::span<const std::byte> element) {
  return is_floating(dtype) && has_values(dtype) && std::isnan(value_of(dtype, element));
}

struct Sides {
  std::vector<std::byte> original, expected, found;
};

class PairComparison {
 public:
  PairComparison(const ShardedState& state, const CopyPair& pair)
      : state_(state), original_(state.leaf(pair.original)), copy_(state.leaf(pair.copy)) {
    result_.pair = pair;
    result_.total = original_.size_elements();
  }

  std::optional<CopyDifference> run() {
    const int64_t original_item = item_size_bytes(original_.dtype);
    const int64_t item = item_size_bytes(copy_.dtype);
    const int64_t step = kStepBytes / std::max(original_item, item);
    Sides sides;
    for (int64_t begin = 0; begin < result_.total; begin += step) {
      checkpoint::throw_if_cancelled();
      const int64_t count = std::min(step, result_.total - begin);
      sides.original.resize(static_cast<size_t>(count * original_item));
      sides.expected.resize(static_cast<size_t>(count * item));
      sides.found.resize(static_cast<size_t>(count * item));
      read_elements(state_, original_, begin, sides.original);
      read_elements(state_, copy_, begin, sides.found);
      cast(original_.dtype, sides.original, copy_.dtype, sides.expected);
      if (sides.expected != sides.found) count_differences(sides, begin);
    }
    if (result_.differing == 0) return std::nullopt;
    return result_;
  }

 private:
  void count_differences(const Sides& sides, int64_t begin) {
    const auto original_item = static_cast<size_t>(item_size_bytes(original_.dtype));
    const auto item = static_cast<size_t>(item_size_bytes(copy_.dtype));
    for (size_t i = 0; i * item < sides.found.size(); ++i) {
      const auto expected = std::span(sides.expected).subspan(i * item, item);
      const auto found = std::span(sides.found).subspan(i * item, item);
      if (std::memcmp(expected.data(), found.data(), item) == 0) continue;
      if (mutant("zero_signs_equal") &&
          value_of(copy_.dtype, expected) == value_of(copy_.dtype, found))
        continue;
      if (is_nan(copy_.dtype, expected) && is_nan(copy_.dtype, found) &&
          !mutant("nan_differs_from_nan"))
        continue;
      if (result_.differing++ > 0) continue;
      const auto original = std::span(sides.original).subspan(i * original_item, original_item);
      result_.index = to_string(index_of(
          (mutant("copy_place_of_step") ? 0 : begin) + static_cast<int64_t>(i), original_.shape));
      result_.original = describe(original_.dtype, original);
      result_.expected = describe(copy_.dtype, expected);
      result_.found = describe(copy_.dtype, found);
    }
  }

  const ShardedState& state_;
  const Leaf& original_;
  const Leaf& copy_;
  CopyDifference result_;
};

// Why two leaves cannot be compared; empty when they can.
std::string why_not(const Leaf& original, const Leaf& copy) {
  if (original.size_elements() != copy.size_elements()) {
    return quote(copy.name) + ": " + to_string(original.shape) + " and " + to_string(copy.shape);
  }
  if (can_cast(original.dtype, copy.dtype)) return "";
  return quote(copy.name) + ": no cast from " + name(original.dtype) + " to " + name(copy.dtype);
}

}  // namespace

std::vector<CopyPair> copy_pairs(const ShardedState& state, std::vector<std::string>* orphans) {
  std::vector<CopyPair> pairs;
  const auto add = [&](CopyPair::Kind kind, const std::string& name, int original, int copy) {
    if (same_bytes(state.leaf(original), state.leaf(copy))) return;
    pairs.push_back({kind, name, original, copy});
  };
  std::map<std::string, int> model_copies;
  for (const checkpoint::ParameterState& parameter : state.parameters) {
    const bool apart = parameter.model_copy >= 0;
    if (apart) add(CopyPair::Kind::kMaster, parameter.name, parameter.weight, parameter.model_copy);
    model_copies.emplace(parameter.name, apart ? parameter.model_copy : parameter.weight);
  }
  for (const auto& [original, copy] : state.copies) {
    add(CopyPair::Kind::kRestated, state.leaf(copy).name, original, copy);
  }
  for (const auto& [original, copy] : state.replicas) {
    const Leaf& leaf = state.leaf(copy);
    const Leaf& first = state.leaf(original);
    add(CopyPair::Kind::kReplica, leaf.name + " " + first.state + ", " + leaf.state, original,
        copy);
  }
  for (const checkpoint::Alias& alias : state.aliases) {
    const auto target = model_copies.find(alias.target);
    if (target == model_copies.end()) {
      orphans->push_back(quote(alias.name) + " = " + quote(alias.target));
    } else if (alias.model_copy >= 0 && !mutant("tied_copy_ignored")) {
      add(CopyPair::Kind::kTied, alias.name, target->second, alias.model_copy);
    }
  }
  return pairs;
}

CopyReport compare_copies(const ShardedState& state, const std::vector<CopyPair>& pairs,
                          int workers) {
  CopyReport report;
  std::vector<std::optional<CopyDifference>> differences(pairs.size());
  std::vector<std::string> reasons(pairs.size());
  parallel_for(pairs.size(), workers, [&](size_t i) {
    reasons[i] = why_not(state.leaf(pairs[i].original), state.leaf(pairs[i].copy));
    if (reasons[i].empty()) differences[i] = PairComparison(state, pairs[i]).run();
  });
  for (size_t i = 0; i < pairs.size(); ++i) {
    if (!reasons[i].empty()) {
      report.uncompared.push_back(reasons[i]);
      continue;
    }
    ++report.pairs[static_cast<int>(pairs[i].kind)];
    report.elements += state.leaf(pairs[i].copy).size_elements();
    if (differences[i]) report.differences.push_back(std::move(*differences[i]));
  }
  return report;
}

}  // namespace isoshard::reshard
