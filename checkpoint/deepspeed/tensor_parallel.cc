// The lists of patterns; the rule that matches first is the one that counts.
#include "checkpoint/deepspeed/tensor_parallel.h"

#include <algorithm>
#include <map>

#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

// Dimensions of the shard tensors; 0 if no rank names one.
size_t dims_of(const std::vector<std::optional<Shape>>& shards) {
  for (const std::optional<Shape>& shard : shards) {
    if (shard) return shard->size();
  }
  return 0;
}

}  // namespace

TensorParallelInfo::TensorParallelInfo(const Fields& fields, int file, NodeId info)
    : fields_(fields), file_(file), info_(info) {
  if (info == kNoNode) return;
  if (!fields.pickle().is_mapping(info))
    fields.fail("A value has the wrong type.", "universal_checkpoint_info", "dict",
                isoshard::checkpoint::name(fields.pickle().kind(info)));
  if (const NodeId version = fields.maybe(info, "universal_checkpoint_version");
      version != kNoNode) {
    const Kind kind = fields.pickle().kind(version);
    version_ = kind == Kind::kFloat ? fields.pickle().real_value(version)
                                    : static_cast<double>(fields.integer(version, "version"));
  }
  replicated_ = read_list("tp_replicated_parameter_patterns");
  averaged_ = read_list("parameter_to_average_patterns");
  two_sub_params_ = read_list("parameter_with_2_sub_params_cat_dim_0");
  rows_ = read_list("parameter_with_row_parallelism_patterns");
  vocabulary_ = read_list("vocabulary_parameter_patterns");
  if (const NodeId reasons = fields.maybe(info, "autotp_unsupported_parameter_patterns");
      reasons != kNoNode) {
    const std::vector<NodeId>& entries = fields.pickle().entries(reasons);
    for (size_t i = 0; i + 1 < entries.size(); i += 2) {
      unsupported_.add(fields.text(entries[i], "autotp_unsupported_parameter_patterns"),
                       fields.document().path());
      reasons_.push_back(fields.text(entries[i + 1], "autotp_unsupported_parameter_patterns"));
    }
  }
  read_sub_params();
  read_maps();
}

bool TensorParallelInfo::says_anything() const {
  return replicated_.size() + averaged_.size() + two_sub_params_.size() + rows_.size() +
             vocabulary_.size() + unsupported_.size() + maps_.size() + sub_params_.size() >
         0;
}

std::vector<std::string> TensorParallelInfo::unused_patterns(
    const std::vector<std::string>& names) const {
  std::map<std::string, bool> used;  // a pattern of two lists counts where either matches
  for (const PatternList* list : lists()) {
    for (size_t i = 0; i < list->size(); ++i)
      used.emplace(list->pattern(static_cast<int>(i)), false);
    for (const std::string& name : names) {
      for (int number : list->matching(name)) used[list->pattern(number)] = true;
    }
  }
  std::vector<std::string> result;
  for (const auto& [pattern, matched] : used) {
    if (!matched) result.push_back(pattern);
  }
  return result;
}

bool TensorParallelInfo::left_out(const std::string& name) const {
  if (maps_.size() == 0) return false;
  return std::ranges::none_of(lists(),
                              [&](const PatternList* list) { return list->first(name) >= 0; });
}

std::vector<const PatternList*> TensorParallelInfo::lists() const {
  return {&replicated_, &averaged_,    &two_sub_params_, &rows_,
          &vocabulary_, &unsupported_, &sub_patterns_,   &maps_};
}

void TensorParallelInfo::refuse(const std::string& what, const std::string& name,
                                const std::string& expected, const std::string& found) const {
  throw Error(ErrorInfo{
      .code = ErrorCode::kMismatch,
      .what = what,
      .file = fields_.document().path(),
      .entry = "universal_checkpoint_info, " + quote(name),
      .expected = expected,
      .found = found,
      .next = "files of two saves may be mixed; compare the mp_rank files' times and steps"});
}

PatternList TensorParallelInfo::read_list(const char* key) const {
  PatternList list;
  const NodeId node = fields_.maybe(info_, key);
  if (node == kNoNode) return list;
  for (NodeId item : fields_.list(node, key))
    list.add(fields_.text(item, key), fields_.document().path());
  return list;
}

void TensorParallelInfo::read_sub_params() {
  const char* key = "parameter_with_sub_params";
  const NodeId node = fields_.maybe(info_, key);
  if (node == kNoNode) return;
  for (NodeId entry : fields_.list(node, key)) {
    SubParams sub;
    sub.entry = entry;
    sub.shape = fields_.need(entry, "shape");
    sub.dim = fields_.integer(fields_.need(entry, "partition_dim"), "partition_dim");
    const auto rank = static_cast<int64_t>(fields_.list(sub.shape, "shape").size());
    if (sub.dim < 0 || sub.dim >= rank)
      fields_.fail("An axis does not exist.", key, "below " + std::to_string(rank),
                   std::to_string(sub.dim));
    for (NodeId pattern : fields_.list(fields_.need(entry, "patterns"), "patterns")) {
      sub.pattern = fields_.text(pattern, "patterns");
      sub_patterns_.add(sub.pattern, fields_.document().path());
      sub_entry_.push_back(sub_params_.size());
      sub_params_.push_back(sub);
    }
  }
}

// The number of the one pattern that matches, or −1.
int TensorParallelInfo::one_match(const PatternList& list, const char* key,
                                  const std::string& name) const {
  const std::vector<int> found = list.matching(name);
  if (found.size() > 1) {
    refuse("Two patterns of one list speak of the same parameter.", name,
           std::string("one pattern of ") + key,
           quote(list.pattern(found[0])) + " and " + quote(list.pattern(found[1])));
  }
  return found.empty() ? -1 : found[0];
}

TensorSplit TensorParallelInfo::split_of(const std::string& name,
                                         const std::vector<std::optional<Shape>>& shards) const {
  if (const int found = unsupported_.first(name); found >= 0) {
    throw Error(
        ErrorInfo{.code = ErrorCode::kUnsupported,
                  .what = "The checkpoint says that this parameter's split is not described "
                          "(DeepSpeed: ValueError): " +
                          reasons_[static_cast<size_t>(found)],
                  .file = fields_.document().path(),
                  .entry = quote(name),
                  .next = "save again with DeepSpeed 0.19.8 or newer, which records maps"});
  }
  const int number = one_match(maps_, "affine_map", name);
  std::vector<Shape> shapes;
  TensorSplit split;
  if (number >= 0) {
    const AffineMap map = read_map(map_nodes_[static_cast<size_t>(number)], name);
    if (map.ranks.size() != shards.size())
      refuse("The map of a parameter is for another number of ranks.", name,
             std::to_string(shards.size()), std::to_string(map.ranks.size()));
    for (size_t t = 0; t < shards.size(); ++t) {
      const Shape& mapped = map.ranks[t].shard_shape;
      const bool same = shards[t] ? numel(*shards[t]) == numel(mapped) : numel(mapped) == 0;
      if (!same)
        refuse("A rank's shard is not what the parameter's map says.", name,
               "rank " + std::to_string(t) + ": " + to_string(mapped),
               shards[t] ? to_string(*shards[t]) : "absent");
    }
    if (const std::string why = why_impossible(map); !why.empty())
      fields_.fail("The map of a parameter is impossible.", "affine_map " + quote(name),
                   "pieces that cover " + to_string(map.logical_shape) + " once", why);
    adopt_map(map, name, &split);
    split.shard_dims = dims_of(shards);
    strip_vocabulary(name, &split);
    return split;
  }
  const auto first = std::find_if(shards.begin(), shards.end(), [](const auto& s) { return !!s; });
  if (first == shards.end())
    refuse("No rank records the shape of a parameter.", name, "a shape", "none");
  for (const std::optional<Shape>& shard : shards) {
    shapes.push_back(shard ? *shard : Shape());
    if (!shard && (*first)->empty())
      refuse("A rank's files do not name a parameter of one element.", name, "present", "absent");
    if (!shard) {  // its files leave out what has no element: the width along some axis is 0
      shapes.back() = **first;
      shapes.back()[rows_.first(name) >= 0 && (*first)->size() > 1 ? 1 : 0] = 0;
    }
  }
  split = by_lists(name, shapes);
  split.shard_dims = dims_of(shards);
  strip_vocabulary(name, &split);
  return split;
}

TensorSplit TensorParallelInfo::by_lists(const std::string& name,
                                         const std::vector<Shape>& shards) const {
  TensorSplit split;
  const int ranks = static_cast<int>(shards.size());
  const bool averaged = one_match(averaged_, "parameter_to_average_patterns", name) >= 0;
  if (one_match(replicated_, "tp_replicated_parameter_patterns", name) >= 0 || averaged) {
    const bool whole = replicated_.first(name) >= 0;
    split.kind = whole ? SplitKind::kReplicated : SplitKind::kAveraged;
    for (const Shape& shard : shards) {
      if (shard != shards[0])
        refuse("Ranks hold different shapes of a replicated parameter.", name, to_string(shards[0]),
               to_string(shard));
    }
    split.map = replicated_map(shards[0], ranks);
    return split;
  }
  if (one_match(two_sub_params_, "parameter_with_2_sub_params_cat_dim_0", name) < 0) {
    if (const int found = sub_patterns_.first(name); found >= 0) {
      split.kind = SplitKind::kSubParams;
      cut_sub_params(sub_params_[sub_entry_[static_cast<size_t>(found)]], name, shards, &split);
      return split;
    }
    const bool row = one_match(rows_, "parameter_with_row_parallelism_patterns", name) >= 0;
    split.kind = row ? SplitKind::kRow : SplitKind::kColumn;
    split.dim = row ? 1 : 0;
  } else {
    split.kind = SplitKind::kTwoSubParams;
  }
  Shape whole = shards[0];
  if (split.dim >= whole.size())
    refuse("A parameter has too few dimensions for its split.", name,
           std::string(isoshard::checkpoint::name(split.kind)), to_string(whole));
  whole[split.dim] = 0;
  std::vector<int64_t> widths, second;
  for (const Shape& shard : shards) {
    Shape others = shard;
    const int64_t width = split.dim < shard.size() ? shard[split.dim] : 0;
    if (split.dim < shard.size()) others[split.dim] = 0;
    Shape expected = whole;
    expected[split.dim] = 0;
    if (others != expected)
      refuse("Shards of a parameter do not fit together.", name, to_string(shards[0]),
             to_string(shard));
    const bool halves = split.kind == SplitKind::kTwoSubParams;
    widths.push_back(halves ? (width + 1) / 2 : width);
    second.push_back(width - widths.back());
  }
  split.widths = {widths};
  if (split.kind == SplitKind::kTwoSubParams) split.widths.push_back(second);
  for (const std::vector<int64_t>& sub : split.widths) whole[split.dim] += total_width(sub);
  split.map = split_map(whole, split.dim, split.widths);
  return split;
}

// [sub-parameter][rank], as recorded (0.4 and newer) or even (older).
Widths TensorParallelInfo::sub_widths(const SubParams& entry, const std::string& name,
                                      const std::vector<Shape>& shards, TensorSplit* split) const {
  const NodeId spec = fields_.list(entry.shape, "shape")[static_cast<size_t>(entry.dim)];
  const auto ranks = static_cast<int64_t>(shards.size());
  Widths widths;
  if (version_ >= 0.4) {
    const NodeId all = fields_.maybe(info_, "sub_param_shard_widths");
    const NodeId node = all == kNoNode ? kNoNode : fields_.maybe(all, entry.pattern);
    if (node == kNoNode)
      refuse("The widths of a fused parameter are not recorded (DeepSpeed: AssertionError).", name,
             "sub_param_shard_widths", "absent");
    const std::vector<NodeId>& sizes = fields_.list(spec, "shape");
    for (NodeId item : fields_.list(node, "sub_param_shard_widths"))
      widths.push_back(fields_.shape(item, "sub_param_shard_widths"));
    for (const std::vector<int64_t>& sub : widths) {
      for (int64_t width : sub) {
        if (width > int64_t{1} << 40 || sub.size() > 1'000'000)
          refuse("A recorded width is impossible.", name, "at most 2^40", std::to_string(width));
      }
    }
    bool fits = widths.size() == sizes.size() && !widths.empty();
    Shape expected;
    for (NodeId size : sizes) expected.push_back(fields_.integer(size, "shape"));
    for (size_t i = 0; fits && i < widths.size(); ++i) {
      fits =
          static_cast<int64_t>(widths[i].size()) == ranks && total_width(widths[i]) == expected[i];
    }
    if (!fits)
      refuse("The recorded widths of a fused parameter do not add up (DeepSpeed: AssertionError).",
             name, to_string(expected) + " over " + std::to_string(ranks) + " ranks",
             widths_text(widths));
    return widths;
  }
  split->equal_shares = true;
  Shape sizes;
  if (fields_.pickle().kind(spec) == Kind::kInt) {
    const int64_t count = fields_.integer(spec, "shape");
    int64_t full = 0;
    for (const Shape& shard : shards)
      full +=
          static_cast<size_t>(entry.dim) < shard.size() ? shard[static_cast<size_t>(entry.dim)] : 0;
    if (count < 1 || full % count != 0)
      refuse("A legacy sub-parameter count does not divide the axis (DeepSpeed: AssertionError).",
             name, "a divisor of " + std::to_string(full), std::to_string(count));
    sizes.assign(static_cast<size_t>(count), full / count);
    split->from_count = true;
  } else {
    sizes = fields_.shape(spec, "shape");
  }
  for (int64_t size : sizes) {
    if (size % ranks != 0)
      refuse("A legacy sub-parameter is not divisible (DeepSpeed: AssertionError).", name,
             "a multiple of " + std::to_string(ranks), std::to_string(size));
    widths.emplace_back(static_cast<size_t>(ranks), size / ranks);
  }
  return widths;
}

void TensorParallelInfo::cut_sub_params(const SubParams& entry, const std::string& name,
                                        const std::vector<Shape>& shards,
                                        TensorSplit* split) const {
  split->dim = static_cast<size_t>(entry.dim);
  split->widths = sub_widths(entry, name, shards, split);
  split->sub_file = file_;
  split->sub_entry = entry.entry;
  int64_t total = 0, known = 1;
  for (const Shape& shard : shards) total += numel(shard);
  const std::vector<NodeId>& shape = fields_.list(entry.shape, "shape");
  for (size_t i = 0; i < shape.size(); ++i) {
    int64_t extent = 0;
    if (i == split->dim) {
      for (const std::vector<int64_t>& sub : split->widths) extent += total_width(sub);
    } else {
      extent = fields_.integer(shape[i], "shape");
    }
    split->view.push_back(extent);
    if (extent >= 0 && __builtin_mul_overflow(known, extent, &known)) known = 0;
  }
  const auto inferred = std::count(split->view.begin(), split->view.end(), -1);
  if (inferred == 1 && known > 0)
    std::replace(split->view.begin(), split->view.end(), int64_t{-1}, total / known);
  const std::optional<int64_t> viewed = checked_numel(split->view);
  if (!viewed || *viewed != total)
    refuse("The view of a fused parameter has another number of elements.", name,
           std::to_string(total) + " elements", to_string(split->view));
  split->map = split_map(split->view, split->dim, split->widths);
  for (size_t t = 0; t < shards.size(); ++t) {
    if (numel(split->map.ranks[t].shard_shape) != numel(shards[t]))
      refuse("The recorded widths describe another shard.", name,
             to_string(split->map.ranks[t].shard_shape), to_string(shards[t]));
  }
}

// The recorded map counts; the lists say what kind of split it is, where they say the same.
void TensorParallelInfo::adopt_map(const AffineMap& map, const std::string& name,
                                   TensorSplit* split) const {
  std::vector<Shape> shards;
  for (const RankMap& rank : map.ranks) shards.push_back(rank.shard_shape);
  try {
    *split = by_lists(name, shards);
  } catch (const Error&) {
    *split = TensorSplit{};
    split->kind = SplitKind::kMapped;
  }
  bool same = numel(split->map.logical_shape) == numel(map.logical_shape);
  for (size_t t = 0; same && t < map.ranks.size() && t < split->map.ranks.size(); ++t)
    same = shard_runs(split->map.ranks[t]) == shard_runs(map.ranks[t]) &&
           is_replicated(split->map) == is_replicated(map);
  if (!same) split->kind = SplitKind::kMapped;
  split->map = map;
  split->recorded = true;
}

void TensorParallelInfo::strip_vocabulary(const std::string& name, TensorSplit* split) const {
  if (one_match(vocabulary_, "vocabulary_parameter_patterns", name) < 0) return;
  const NodeId size = fields_.maybe(info_, "original_vocab_size");
  if (size == kNoNode)
    refuse("A vocabulary parameter needs the vocabulary's size (DeepSpeed: KeyError).", name,
           "original_vocab_size", "absent");
  const Shape& shape = split->map.logical_shape;
  split->vocabulary = true;
  split->original_rows = fields_.integer(size, "original_vocab_size");
  if (shape.size() != 2 || split->original_rows < 0)
    refuse("A vocabulary parameter is not a matrix (DeepSpeed: IndexError).", name,
           "two dimensions", to_string(shape));
  split->original_rows = std::min(split->original_rows, shape[0]);
}

namespace {

std::string first_of(const std::vector<std::string>& texts) {
  constexpr size_t kShown = 3;
  std::string result;
  for (size_t i = 0; i < std::min(kShown, texts.size()); ++i)
    result += (i == 0 ? "" : ", ") + quote(texts[i]);
  if (texts.size() > kShown) result += " and " + std::to_string(texts.size() - kShown) + " more";
  return result;
}

}  // namespace

void tell_unused_patterns(ShardedState* state, const TensorParallelInfo& info, bool strict) {
  std::vector<std::string> names = state->module_order, left_out;
  for (const Alias& alias : state->aliases) names.push_back(alias.name);
  for (const BufferState& buffer : state->buffers) names.push_back(buffer.name);
  for (const ParameterState& parameter : state->parameters) {
    names.push_back(parameter.name);
    if (parameter.group >= 0 && info.left_out(parameter.name)) left_out.push_back(parameter.name);
  }
  const auto tell = [&](const std::string& what, const std::vector<std::string>& which) {
    if (which.empty()) return;
    const std::string text = what + ": " + first_of(which);
    (strict ? state->doubts : state->inferred).push_back(text);
  };
  tell(
      "universal_checkpoint_info has patterns that match no parameter's name (DeepSpeed: "
      "AssertionError, unused patterns), so what they were for may be joined wrongly",
      info.unused_patterns(names));
  if (state->topology.tensor > 1)
    tell(
        "universal_checkpoint_info maps other parameters and says nothing of some, which are "
        "joined along axis 0",
        left_out);
}

}  // namespace isoshard::checkpoint
