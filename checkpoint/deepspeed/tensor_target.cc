// See tensor_target.h.
#include "checkpoint/deepspeed/tensor_target.h"

#include <algorithm>
#include <map>
#include <set>
#include <tuple>

#include "checkpoint/deepspeed/fields.h"
#include "core/error.h"
#include "core/split_rules.h"

namespace isoshard::checkpoint {
namespace {

constexpr int64_t kMostHeads = 1024;

// The module that DeepSpeed names when it cuts a parameter.
std::string layer_of(const std::string& parameter) {
  for (const char* end : {".weight", ".bias"}) {
    if (parameter.ends_with(end)) return parameter.substr(0, parameter.rfind('.'));
  }
  return parameter;
}

bool is_cut(const TensorSplit& split) {
  return split.kind == SplitKind::kColumn || split.kind == SplitKind::kRow ||
         split.kind == SplitKind::kSubParams || split.kind == SplitKind::kTwoSubParams;
}

// tensor_parallel.tp.tp_grain_size of ds_config, or 1.
int64_t recorded_grain(const ShardedState& state) {
  const Fields fields(state.document(state.model_files[0]));
  NodeId node = fields.maybe(fields.root(), "ds_config");
  for (const char* key : {"tensor_parallel", "tp"}) {
    if (node == kNoNode || !fields.pickle().is_mapping(node)) return 1;
    NodeId inner = fields.maybe(node, key);
    if (inner == kNoNode && std::string(key) == "tp") inner = fields.maybe(node, "tensor_parallel");
    node = inner;
  }
  if (node == kNoNode || !fields.pickle().is_mapping(node)) return 1;
  const NodeId grain = fields.maybe(node, "tp_grain_size");
  return grain == kNoNode ? 1 : std::max<int64_t>(1, fields.integer(grain, "tp_grain_size"));
}

class TargetMaps {
 public:
  TargetMaps(const ShardedState& state, int ranks, const SplitOptions& options,
             std::vector<std::string>* inferred)
      : state_(state), ranks_(ranks), options_(options), inferred_(*inferred) {
    rule_.grain = options.grain > 0 ? options.grain : recorded_grain(state);
  }

  std::vector<AffineMap> run() {
    constexpr int kMostRanks = 256;  // every model file holds all ranks' maps
    if (ranks_ > kMostRanks)
      refuse(ErrorCode::kUnsupported, "So many tensor-parallel ranks are not supported.", "--to",
             "tp of at most " + std::to_string(kMostRanks), std::to_string(ranks_),
             "take a smaller tp");
    const bool vocabulary = std::ranges::any_of(
        state_.splits, [](const TensorSplit& split) { return split.vocabulary; });
    if (options_.vocabulary_rows > 0 && !vocabulary)
      refuse(ErrorCode::kUsage, "The checkpoint names no vocabulary that could be padded.",
             "--padded-vocab-size", "vocabulary_parameter_patterns", "none", "leave it out");
    for (const ParameterState& parameter : state_.parameters) check(parameter);
    const bool same = std::ranges::all_of(state_.splits, [&](const TensorSplit& split) {
      return split.kind == SplitKind::kExperts || keeps_map(split);
    });
    if (!same && !state_.pipeline.present()) rule_.kv_heads = choose_heads();
    std::vector<AffineMap> maps;
    for (const ParameterState& parameter : state_.parameters) {
      const TensorSplit& split = split_of(parameter);
      const bool whole = !is_cut(split) && split.kind != SplitKind::kMapped;
      if (whole || (split.kind == SplitKind::kMapped && ranks_ == 1))
        maps.push_back(replicated_map(split.map.logical_shape, ranks_));
      else if (keeps_map(split))
        maps.push_back(split.map);
      else
        maps.push_back(split_map(padded_shape(split), split.dim, target_cut(parameter, split)));
    }
    return maps;
  }

 private:
  const TensorSplit& split_of(const ParameterState& parameter) const {
    return state_.split_of(parameter);
  }

  [[noreturn]] void refuse(ErrorCode code, const std::string& what, const std::string& name,
                           const std::string& expected, const std::string& found,
                           const std::string& next) const {
    throw Error(ErrorInfo{.code = code,
                          .what = what,
                          .file = state_.folder,
                          .entry = quote(name),
                          .expected = expected,
                          .found = found,
                          .next = next});
  }

  // The source's ranks are the target's, and so are the rows of a padded vocabulary.
  bool keeps_map(const TensorSplit& split) const {
    return split.ranks() == ranks_ && (!split.vocabulary || options_.vocabulary_rows == 0 ||
                                       options_.vocabulary_rows == split.map.logical_shape.at(0));
  }
  void check(const ParameterState& parameter) const;
  Shape padded_shape(const TensorSplit& split) const;
  Widths cut(const ParameterState& parameter, const TensorSplit& split, bool source,
             const RemainderFirst& rule) const;
  Widths target_cut(const ParameterState& parameter, const TensorSplit& split) const;
  Widths equal_cut(const ParameterState& parameter, const TensorSplit& split) const;
  int64_t choose_heads();
  void check_heads(int64_t heads);
  void check_division(int64_t heads);
  bool gives_source(const RemainderFirst& rule);
  const std::vector<const ParameterState*>& samples();

  const ShardedState& state_;
  const int ranks_;
  const SplitOptions& options_;
  std::vector<std::string>& inferred_;
  RemainderFirst rule_;
  std::vector<const ParameterState*> samples_;
};

void TargetMaps::check(const ParameterState& parameter) const {
  if (parameter.split < 0)
    refuse(ErrorCode::kUnsupported,
           "A checkpoint of one tensor-parallel rank does not say how its tensors are to be cut.",
           parameter.name, "universal_checkpoint_info, as a run with autotp_size > 1 writes it",
           "none",
           "name a checkpoint of the same model with --split-like, from any run with autotp_size "
           "above 1");
  const TensorSplit& split = split_of(parameter);
  // The mean of equal values is that value, bit for bit, where their number is a power of two.
  if (split.kind == SplitKind::kAveraged && (ranks_ & (ranks_ - 1)) != 0)
    refuse(ErrorCode::kUnsupported,
           "Of this parameter the mean over the ranks counts; that of so many equal values is not "
           "the value itself, bit for bit.",
           parameter.name, "tp=1, 2, 4, 8 and so on", "tp=" + std::to_string(ranks_),
           "say tp=1, or another of these, even where the source has this tp itself");
  if (split.kind == SplitKind::kMapped && ranks_ != 1 && ranks_ != split.ranks())
    refuse(ErrorCode::kUnsupported,
           "Only a map says how this parameter is cut; there is no rule for other degrees.",
           parameter.name, "tp=" + std::to_string(state_.topology.tensor) + " or tp=1",
           "tp=" + std::to_string(ranks_),
           "convert to universal and let DeepSpeed load it at the new degree");
}

// The shape that is cut: a padded vocabulary keeps its rows unless others are asked for.
Shape TargetMaps::padded_shape(const TensorSplit& split) const {
  Shape shape = split.kind == SplitKind::kSubParams ? split.view : split.map.logical_shape;
  if (split.vocabulary && options_.vocabulary_rows > 0) {
    if (options_.vocabulary_rows < split.original_rows)
      refuse(ErrorCode::kUsage, "The padded vocabulary is smaller than the vocabulary.",
             "--padded-vocab-size", "at least " + std::to_string(split.original_rows),
             std::to_string(options_.vocabulary_rows), "give a larger one, or leave it out");
    shape[0] = options_.vocabulary_rows;
  }
  return shape;
}

// Widths of the target, or, to be compared, of the source.
Widths TargetMaps::cut(const ParameterState& parameter, const TensorSplit& split, bool source,
                       const RemainderFirst& rule) const {
  if (state_.pipeline.present()) return equal_cut(parameter, split);
  const std::string layer = layer_of(parameter.name);
  const int ranks = source ? split.ranks() : ranks_;
  const Shape shape = source ? split.map.logical_shape : padded_shape(split);
  if (split.kind != SplitKind::kSubParams && split.kind != SplitKind::kTwoSubParams)
    return {split_widths(rule, shape[split.dim], ranks, layer)};
  Widths widths;
  for (const std::vector<int64_t>& sub : split.widths)
    widths.push_back(split_widths(rule, total_width(sub), ranks, layer));
  return widths;
}

// Older entries of sub-parameters record no widths: a reader takes equal ones.
Widths TargetMaps::target_cut(const ParameterState& parameter, const TensorSplit& split) const {
  Widths widths = cut(parameter, split, /*source=*/false, rule_);
  for (const std::vector<int64_t>& sub : widths) {
    if (!split.equal_shares || std::ranges::count(sub, sub[0]) == ranks_) continue;
    refuse(
        ErrorCode::kUnsupported,
        "The source's entry of a fused parameter (universal_checkpoint_version below 0.4) has no "
        "place for unequal widths.",
        parameter.name, "equal shares", widths_text(widths),
        "take a tp that divides each of its parts and the key-value heads");
  }
  return widths;
}

// The caller's own layers, as in Megatron-LM: every rank has the same share.
Widths TargetMaps::equal_cut(const ParameterState& parameter, const TensorSplit& split) const {
  std::vector<int64_t> totals = {padded_shape(split)[split.dim]};
  if (split.kind == SplitKind::kSubParams || split.kind == SplitKind::kTwoSubParams) {
    totals.clear();
    for (const std::vector<int64_t>& sub : split.widths) totals.push_back(total_width(sub));
  }
  Widths widths;
  for (int64_t total : totals) {
    if (total % ranks_ != 0)
      refuse(
          ErrorCode::kUnsupported,
          "The tensor-parallel ranks of a pipeline hold equal shares, which this tensor does not "
          "have.",
          parameter.name, "a multiple of " + std::to_string(ranks_), std::to_string(total),
          split.vocabulary ? "say how many rows the target's vocabulary has: --padded-vocab-size"
                           : "take another tp");
    widths.emplace_back(static_cast<size_t>(ranks_), total / ranks_);
  }
  return widths;
}

// One parameter of each sort, as far as widths go: thousands of layers are cut alike.
const std::vector<const ParameterState*>& TargetMaps::samples() {
  if (!samples_.empty()) return samples_;
  std::set<std::tuple<int, std::vector<int64_t>, Widths, bool>> seen;
  for (const ParameterState& parameter : state_.parameters) {
    const TensorSplit& split = split_of(parameter);
    if (!is_cut(split)) continue;
    // Whether heads count for a name, seen at a width that heads would change.
    const bool heads =
        split_widths({.kv_heads = 1}, 2, 2, layer_of(parameter.name)) == std::vector<int64_t>{2, 0};
    if (seen.emplace(static_cast<int>(split.kind), padded_shape(split), split.widths, heads).second)
      samples_.push_back(&parameter);
  }
  return samples_;
}

bool TargetMaps::gives_source(const RemainderFirst& rule) {
  const std::vector<const ParameterState*>& all = samples();
  return std::all_of(all.begin(), all.end(), [&](const ParameterState* parameter) {
    const TensorSplit& split = split_of(*parameter);
    return split.ranks() == 1 || cut(*parameter, split, /*source=*/true, rule) == split.widths;
  });
}

void TargetMaps::check_heads(int64_t heads) {
  RemainderFirst rule = rule_;
  rule.kv_heads = heads;
  for (const ParameterState* parameter : samples()) {
    const TensorSplit& split = split_of(*parameter);
    if (split.ranks() == 1) continue;
    const Widths predicted = cut(*parameter, split, /*source=*/true, rule);
    if (predicted == split.widths) continue;
    Widths ceil;
    for (const std::vector<int64_t>& sub : split.widths)
      ceil.push_back(ceil_widths(total_width(sub), split.ranks()));
    const bool chunked = ceil == split.widths;
    refuse(ErrorCode::kMismatch,
           std::string("The rule for the target's widths does not give the source's own widths") +
               (chunked ? ": those are torch.chunk's, which AutoTP never writes." : "."),
           parameter->name,
           widths_text(predicted) + " (remainder first, " + std::to_string(heads) +
               " key-value heads, grain " + std::to_string(rule.grain) + ")",
           widths_text(split.widths) + (chunked ? " (ceil)" : ""),
           "give the model's --num-kv-heads and --tp-grain-size; tp=1 needs neither");
  }
}

// Heads that divide the axis of no layer made of heads are those of another model.
void TargetMaps::check_division(int64_t heads) {
  if (heads == 0) return;
  const ParameterState* layer = nullptr;  // any that heads count for
  for (const ParameterState* parameter : samples()) {
    const RemainderFirst one{.kv_heads = 1};
    if (split_widths(one, 2, 2, layer_of(parameter->name)) != std::vector<int64_t>{2, 0}) continue;
    layer = parameter;
    for (const std::vector<int64_t>& sub : split_of(*parameter).widths) {
      if (total_width(sub) % heads == 0) return;
    }
  }
  if (layer == nullptr) return;
  refuse(ErrorCode::kUsage, "The number of key-value heads divides no layer of heads.", layer->name,
         "a divisor of " + widths_text(split_of(*layer).widths) + ", summed", std::to_string(heads),
         "give num_key_value_heads of the model's config.json");
}

// The number of key-value heads: told, or such that every number that fits the source gives the
// same target.
int64_t TargetMaps::choose_heads() {
  if (options_.kv_heads >= 0) {
    check_heads(options_.kv_heads);
    check_division(options_.kv_heads);
    return options_.kv_heads;
  }
  const std::vector<const ParameterState*>& all = samples();
  std::map<int64_t, std::vector<Widths>> fitting;
  for (int64_t heads = 0; heads <= kMostHeads; ++heads) {
    RemainderFirst rule = rule_;
    rule.kv_heads = heads;
    if (!gives_source(rule)) continue;
    for (const ParameterState* parameter : all)
      fitting[heads].push_back(cut(*parameter, split_of(*parameter), /*source=*/false, rule));
  }
  if (fitting.empty()) check_heads(0);
  const auto& [first_heads, first] = *fitting.begin();
  for (const auto& [heads, widths] : fitting) {
    for (size_t i = 0; i < all.size(); ++i) {
      if (widths[i] == first[i]) continue;
      refuse(ErrorCode::kUsage,
             "The widths at tp=" + std::to_string(ranks_) +
                 " depend on the model's number of key-value heads, which no checkpoint records.",
             all[i]->name,
             "--num-kv-heads N (num_key_value_heads of the model's config.json; 0: none)",
             widths_text(first[i]) + " for " + std::to_string(first_heads) + ", " +
                 widths_text(widths[i]) + " for " + std::to_string(heads),
             "give --num-kv-heads, or --model-config with the model's config.json");
    }
  }
  if (fitting.size() < static_cast<size_t>(kMostHeads) && state_.topology.tensor > 1)
    inferred_.push_back(
        "tensor-parallel widths: every number of key-value heads that fits the "
        "source's widths gives the same");
  return first_heads;
}

}  // namespace

std::vector<AffineMap> target_maps(const ShardedState& state, int ranks,
                                   const SplitOptions& options,
                                   std::vector<std::string>* inferred) {
  return TargetMaps(state, ranks, options, inferred).run();
}

Widths widths_of(const TensorSplit& split, const AffineMap& target) {
  if (target == split.map) return split.widths;
  Widths widths(split.widths.size());
  for (const RankMap& rank : target.ranks) {
    for (size_t i = 0; i < widths.size(); ++i)
      widths[i].push_back(rank.pieces.at(i).shape.at(split.dim));
  }
  return widths;
}

void adopt_splits(ShardedState* state, const ShardedState& other) {
  const auto refuse = [&](const std::string& name, const std::string& expected,
                          const std::string& found) {
    throw Error(ErrorInfo{.code = ErrorCode::kMismatch,
                          .what = "The checkpoint of --split-like is not of the same model.",
                          .file = other.folder,
                          .entry = quote(name),
                          .expected = expected,
                          .found = found,
                          .next = "name one whose parameters have the same names and shapes"});
  };
  if (other.split_file < 0)
    refuse("universal_checkpoint_info", "present: a run with autotp_size above 1", "absent");
  if (state->topology.tensor != 1)
    refuse("--split-like", "a source of one tensor-parallel rank",
           "tp=" + std::to_string(state->topology.tensor) + ", which says itself how it is cut");
  for (ParameterState& parameter : state->parameters) {
    const ParameterState* match = other.find_parameter(parameter.name);
    if (match == nullptr) refuse(parameter.name, "present", "absent");
    if (match->shape != parameter.shape)
      refuse(parameter.name, to_string(parameter.shape), to_string(match->shape));
    parameter.split = static_cast<int>(state->splits.size());
    state->splits.push_back(other.split_of(*match));
    if (state->splits.back().sub_file >= 0)
      state->splits.back().sub_file = static_cast<int>(state->files.size());
  }
  state->split_file = static_cast<int>(state->files.size());
  state->files.push_back(other.files[static_cast<size_t>(other.split_file)]);
  state->files.back().inside = false;
}

}  // namespace isoshard::checkpoint
