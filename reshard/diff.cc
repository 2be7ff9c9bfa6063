// See diff.h. One pass a side for the CRCs, then the differing leaves once more.
#include "reshard/diff.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <map>
#include <set>

#include "checkpoint/cancel.h"
#include "checkpoint/deepspeed/hyper.h"
#include "checkpoint/deepspeed/name_filter.h"
#include "checkpoint/deepspeed/reader.h"
#include "core/cast.h"
#include "reshard/diff_evidence.h"
#include "reshard/explain.h"
#include "reshard/json_diff.h"

namespace isoshard::reshard {

using checkpoint::Flavour;
using checkpoint::ShardedState;

namespace {

using Verdict = SectionOutcome::Verdict;

constexpr int64_t kRoundingUlp = 64;  // differences up to here are called rounding

struct Counted {
  int64_t different = 0;
  int64_t first = -1;   // element
  int64_t max_ulp = 0;  // INT64_MAX where it has no meaning
};

// `a` and `b` have one dtype and as many elements.
Counted count_differences(const TensorValues& a, const TensorValues& b, int64_t ulp) {
  Counted result;
  const int64_t size = a.size_elements(), step = 1 << 16;
  const auto item = static_cast<size_t>(item_size_bytes(a.dtype));
  for (int64_t begin = 0; begin < size; begin += step) {
    checkpoint::throw_if_cancelled();
    const int64_t count = std::min(step, size - begin);
    const std::vector<std::byte> x = read_elements(a, begin, count);
    const std::vector<std::byte> y = read_elements(b, begin, count);
    for (size_t at = 0; at < x.size(); at += item) {
      if (std::memcmp(x.data() + at, y.data() + at, item) == 0) continue;
      const int64_t distance = ulp_distance(a.dtype, {x.data() + at, item}, {y.data() + at, item});
      if (distance <= ulp && ulp > 0) continue;
      result.max_ulp = std::max(result.max_ulp, distance);
      if (result.first < 0) result.first = begin + static_cast<int64_t>(at / item);
      ++result.different;
    }
  }
  return result;
}

bool whole_number(const std::string& text, int64_t* value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *value);
  return error == std::errc() && end == text.data() + text.size();
}

class Comparison {
 public:
  Comparison(Storage& storage, const ShardedState& a, const ShardedState& b,
             const DiffOptions& options)
      : storage_(storage),
        options_(options),
        filter_(options.only),
        a_{"A", a, logical_leaves(a, b), {}},
        b_{"B", b, logical_leaves(b, a), {}} {}

  DiffReport run() {
    digest(&a_);
    digest(&b_);
    compare_leaves("weights");
    std::set<std::string> states;
    for (const DiffSide* side : {&a_, &b_}) {
      for (const auto& [section, leaves] : side->leaves.sections) states.insert(section);
    }
    for (const std::string& section : states) {
      if (section != "weights" && section != "buffers") compare_leaves(section);
    }
    compare_steps();
    if (states.count("buffers") != 0) compare_leaves("buffers");
    compare_hyper();
    explain();
    return std::move(report_);
  }

 private:
  struct Pair {
    std::string section, name, state;
    int leaf_a = -1, leaf_b = -1;
  };

  static bool weights_only(const DiffSide& side) { return side.state.flavour == Flavour::kWeights; }
  SectionOutcome& outcome() { return report_.sections.back(); }

  void digest(DiffSide* side) {
    StreamOptions stream = options_.stream;
    stream.digest.clear();
    for (const auto& [section, leaves] : side->leaves.sections) {
      for (const LogicalLeaf& leaf : leaves) {
        if (filter_.matches(leaf.name)) stream.digest.push_back(leaf.leaf);
      }
    }
    side->crcs = digest_leaves(storage_, side->state, stream).leaves;
  }

  // Opens the section's outcome; false if a side cannot hold it, which the outcome then says.
  bool open_section(const std::string& section) {
    report_.sections.push_back({.section = section, .note = ""});
    const bool held_by_weights = section == "weights" || section == "buffers";
    const bool a_lacks = weights_only(a_) && !held_by_weights;
    const bool b_lacks = weights_only(b_) && !held_by_weights;
    if (!a_lacks && !b_lacks) return true;
    outcome().verdict = Verdict::kAbsent;
    outcome().note = a_lacks && b_lacks ? "both hold weights only"
                                        : (a_lacks ? a_ : b_).letter + " holds weights only";
    return false;
  }

  void add_difference(Difference difference) {
    outcome().verdict = Verdict::kDifferent;
    report_.differences.push_back(std::move(difference));
  }
  void add_missing(const Pair& pair, const DiffSide& holder, const DiffSide& lacking, int leaf) {
    const int64_t total = leaf < 0 ? 1 : holder.state.leaf(leaf).size_elements();
    ++outcome().different;
    add_difference({.section = pair.section,
                    .name = pair.name,
                    .state = pair.state,
                    .different = total,
                    .total = total,
                    .explanation = "missing in " + lacking.letter});
  }

  void compare_leaves(const std::string& section) {
    if (!open_section(section)) return;
    for (const LogicalLeaf& leaf : a_.leaves.sections[section]) {
      if (!filter_.matches(leaf.name)) continue;
      const int other = b_.leaves.find(section, leaf.name);
      compare_pair({section, leaf.name, leaf.state, leaf.leaf, other});
    }
    for (const LogicalLeaf& leaf : b_.leaves.sections[section]) {
      const bool done = a_.leaves.by_name[section].count(leaf.name) != 0;
      if (done || !filter_.matches(leaf.name)) continue;
      const int other = a_.leaves.find(section, leaf.name);  // an alias in A
      compare_pair({section, leaf.name, leaf.state, other, leaf.leaf});
    }
    if (section == "weights") {
      compare_aliases(a_, b_);
      compare_aliases(b_, a_);
    }
  }

  void compare_pair(const Pair& pair) {
    ++outcome().names;
    if (pair.leaf_b < 0) return add_missing(pair, a_, b_, pair.leaf_a);
    if (pair.leaf_a < 0) return add_missing(pair, b_, a_, pair.leaf_b);
    const checkpoint::Leaf& a = a_.state.leaf(pair.leaf_a);
    const checkpoint::Leaf& b = b_.state.leaf(pair.leaf_b);
    if (a.shape != b.shape) {
      ++outcome().different;
      pairs_[report_.differences.size()] = pair;
      return add_difference({.section = pair.section,
                             .name = pair.name,
                             .state = pair.state,
                             .different = b.size_elements(),
                             .total = b.size_elements(),
                             .explanation = "shape " + to_string(a.shape) + " in A, " +
                                            to_string(b.shape) + " in B"});
    }
    const bool same_crc =
        a_.crcs[static_cast<size_t>(pair.leaf_a)] == b_.crcs[static_cast<size_t>(pair.leaf_b)];
    if (a.dtype == b.dtype && same_crc) return;
    compare_values(pair, a.dtype, b.dtype);
  }

  // Weights and buffers of two dtypes are equal when A's values, cast, are B's; where only A is a
  // file of weights, and so what a conversion made, when B's values, cast, are A's.
  void compare_values(const Pair& pair, DType dtype_a, DType dtype_b) {
    TensorValues a = values_of(a_.state, pair.leaf_a, pair.state);
    TensorValues b = values_of(b_.state, pair.leaf_b, pair.state);
    const TensorValues original_a = a, original_b = b;
    const bool forward = !(weights_only(a_) && !weights_only(b_));
    if (dtype_a != dtype_b) {
      const DType from = forward ? dtype_a : dtype_b, to = forward ? dtype_b : dtype_a;
      const bool castable = pair.section == "weights" || pair.section == "buffers";
      if (!castable || !can_cast(from, to)) {
        ++outcome().different;
        pairs_[report_.differences.size()] = pair;
        return add_difference(
            {.section = pair.section,
             .name = pair.name,
             .state = pair.state,
             .different = a.size_elements(),
             .total = a.size_elements(),
             .explanation = std::string(name(dtype_a)) + " in A, " + name(dtype_b) + " in B"});
      }
      if (forward)
        a = cast_values(a, to);
      else
        b = cast_values(b, to);
    }
    const Counted counted = count_differences(a, b, options_.ulp);
    if (counted.different == 0) {
      if (dtype_a != dtype_b) {
        outcome().verdict = std::max(outcome().verdict, Verdict::kCast);
        outcome().note = std::string(name(dtype_a)) + " in A, " + name(dtype_b) + " in B";
      } else if (outcome().note.empty()) {
        outcome().note = "within " + std::to_string(options_.ulp) + " ulp";
      }
      return;
    }
    ++outcome().different;
    const std::vector<std::byte> x = read_elements(original_a, counted.first, 1);
    const std::vector<std::byte> y = read_elements(original_b, counted.first, 1);
    pairs_[report_.differences.size()] = pair;
    max_ulp_[report_.differences.size()] = counted.max_ulp;
    add_difference(
        {.section = pair.section,
         .name = pair.name,
         .state = pair.state,
         .different = counted.different,
         .total = a.size_elements(),
         .first = FirstDifference{index_of(counted.first, a.shape), element_text(dtype_a, x),
                                  element_text(dtype_b, y), element_bits(x), element_bits(y)},
         .explanation = kNoExplanation});
  }

  // Tied names of one side: the other must hold them, and tied too unless it is a file of weights.
  void compare_aliases(const DiffSide& side, const DiffSide& other) {
    for (const auto& [alias, target] : side.leaves.aliases) {
      if (!filter_.matches(alias)) continue;
      const auto same = other.leaves.aliases.find(alias);
      if (same != other.leaves.aliases.end() && same->second == target) continue;
      const int leaf = other.leaves.find("weights", alias);
      if (leaf < 0) {
        ++outcome().names;
        add_missing({"weights", alias, "alias"}, side, other, -1);
        continue;
      }
      if (leaf == other.leaves.find("weights", target)) continue;
      if (weights_only(side) || weights_only(other)) {
        outcome().note =
            plain_name(alias) + " is tied in " + side.letter + ", stored apart in " + other.letter;
        continue;
      }
      ++outcome().different;
      add_difference({.section = "weights",
                      .name = alias,
                      .state = "alias",
                      .different = 1,
                      .total = 1,
                      .explanation = "tied to " + plain_name(target) + " in " + side.letter +
                                     ", not in " + other.letter});
    }
  }

  // parameter → state → value, in words of scalar_text.
  using Scalars = std::map<std::string, std::map<std::string, std::string>>;
  Scalars scalars_of(const DiffSide& side) const {
    Scalars result;
    std::map<std::pair<int, checkpoint::NodeId>, std::string> known;
    for (const checkpoint::ParameterState& parameter : side.state.parameters) {
      if (!filter_.matches(parameter.name)) continue;
      for (const checkpoint::Scalar& scalar : parameter.scalars) {
        const auto [text, fresh] =
            known.try_emplace(std::pair(scalar.value.file, scalar.value.node));
        if (fresh) text->second = checkpoint::scalar_text(side.state, scalar.value);
        if (text->second != "None") result[parameter.name][scalar.name] = text->second;
      }
    }
    return result;
  }

  void compare_steps() {
    if (!open_section("steps")) return;
    Scalars a = scalars_of(a_), b = scalars_of(b_);
    std::vector<std::string> names;
    for (const DiffSide* side : {&a_, &b_}) {
      for (int number : parameters_in_flat_order(side->state)) {
        names.push_back(side->state.parameters[static_cast<size_t>(number)].name);
      }
    }
    std::set<std::string> done;
    for (const std::string& name : names) {
      if ((a.count(name) == 0 && b.count(name) == 0) || !done.insert(name).second) continue;
      ++outcome().names;
      const size_t before = report_.differences.size();
      for (const auto& [state, value] : a[name]) compare_step({name, state, value, b[name][state]});
      for (const auto& [state, value] : b[name]) {
        if (a[name].count(state) == 0) compare_step({name, state, "", value});
      }
      outcome().different += report_.differences.size() > before;
    }
    if (names.empty() || done.empty()) report_.sections.pop_back();
  }
  struct Step {
    std::string name, state, a, b;  // an empty value: missing
  };
  void compare_step(const Step& step) {
    if (step.a == step.b) return;
    Difference difference{.section = "steps",
                          .name = step.name,
                          .state = step.state,
                          .different = 1,
                          .total = 1,
                          .first = FirstDifference{{}, step.a, step.b, "", ""},
                          .explanation = kNoExplanation};
    int64_t a = 0, b = 0;
    if (step.a.empty() || step.b.empty()) {
      difference.explanation = std::string("missing in ") + (step.a.empty() ? "A" : "B");
      difference.first.reset();
    } else if (whole_number(step.a, &a) && whole_number(step.b, &b)) {
      const int64_t distance = b > a ? b - a : a - b;
      difference.explanation = "B stands " + std::to_string(distance) +
                               (distance == 1 ? " step " : " steps ") +
                               (b > a ? "after A" : "before A");
    }
    add_difference(std::move(difference));
  }

  void compare_hyper() {
    if (!open_section("hyper")) return;
    if (!options_.only.empty()) {
      outcome().verdict = Verdict::kAbsent;
      outcome().note = "left out by --only";
      return;
    }
    const JsonComparison result =
        compare_json(checkpoint::hyper_json(a_.state), checkpoint::hyper_json(b_.state));
    outcome().names = result.values;
    outcome().different = static_cast<int64_t>(result.differences.size());
    for (const JsonDifference& d : result.differences) {
      add_difference({.section = "hyper",
                      .name = d.path,
                      .state = "hyper",
                      .different = 1,
                      .total = 1,
                      .first = FirstDifference{{}, d.a, d.b, "", ""},
                      .explanation = "another setting"});
    }
  }

  void explain() {
    if (pairs_.empty()) return;
    Explainer explainer(originals());
    std::vector<std::string> wrong_weights;
    for (const auto& [number, pair] : pairs_) {
      Difference& difference = report_.differences[number];
      TensorValues found = values_of(b_.state, pair.leaf_b, pair.state);
      found.name = pair.name;
      if (difference.section == "weights") wrong_weights.push_back(pair.name);
      std::string text = explainer.explain(found);
      difference.explained = text != kNoExplanation;
      const auto ulp = max_ulp_.find(number);
      if (difference.explained) {
        const bool counted = ulp != max_ulp_.end();
        difference.explanation = counted ? text : difference.explanation + "; " + text;
      } else if (ulp != max_ulp_.end() && ulp->second <= kRoundingUlp) {
        difference.explanation =
            "rounding: every difference is at most " + std::to_string(ulp->second) + " ulp";
      }
    }
    report_.reason = round_robin_reason(storage_, a_, b_, options_.stream);
    if (report_.reason.empty()) {
      report_.reason = round_robin_reason(storage_, b_, a_, options_.stream);
    }
    report_.right = which_is_right(a_, b_, wrong_weights);
  }

  std::vector<TensorValues> originals() const {
    std::vector<TensorValues> result;
    const auto add = [&](const std::string& section) {
      const auto leaves = a_.leaves.sections.find(section);
      if (leaves == a_.leaves.sections.end()) return;
      for (const LogicalLeaf& leaf : leaves->second) {
        result.push_back(values_of(a_.state, leaf.leaf, leaf.state));
      }
    };
    add("weights");
    for (const auto& [section, leaves] : a_.leaves.sections) {
      if (section != "weights") add(section);
    }
    return result;
  }

  Storage& storage_;
  const DiffOptions& options_;
  checkpoint::NameFilter filter_;
  DiffSide a_, b_;
  DiffReport report_;
  std::map<size_t, Pair> pairs_;       // by number of the difference: both sides have values
  std::map<size_t, int64_t> max_ulp_;  // likewise: of one shape and dtype
};

}  // namespace

const char* name(SectionOutcome::Verdict verdict) {
  switch (verdict) {
    case Verdict::kEqual:
      return "equal";
    case Verdict::kCast:
      return "cast";
    case Verdict::kDifferent:
      return "different";
    case Verdict::kAbsent:
      break;
  }
  return "absent";
}

DiffReport diff(Storage& storage, const ShardedState& a, const ShardedState& b,
                const DiffOptions& options) {
  return Comparison(storage, a, b, options).run();
}

}  // namespace isoshard::reshard
