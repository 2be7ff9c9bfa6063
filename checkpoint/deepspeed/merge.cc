// See merge.h.
#include "checkpoint/deepspeed/merge.h"

#include <algorithm>
#include <functional>
#include <unordered_map>
#include <unordered_set>

#include "checkpoint/deepspeed/mean_file.h"
#include "checkpoint/deepspeed/reader.h"
#include "core/check.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

// Those of elements [first, total), counted from `first`, in order and joined.
std::vector<FileFragment> tidy(std::vector<FileFragment> fragments, int64_t first, int64_t total,
                               int64_t item) {
  std::sort(fragments.begin(), fragments.end(),
            [](const FileFragment& a, const FileFragment& b) { return a.begin < b.begin; });
  std::vector<FileFragment> result;
  for (FileFragment f : fragments) {
    const int64_t before = std::clamp<int64_t>(first - f.begin, 0, f.count);
    f.begin += before - first;
    f.count = std::min(f.count - before, total - first - f.begin);
    f.offset_bytes += before * item;
    if (f.count <= 0) continue;
    if (!result.empty()) {
      FileFragment& last = result.back();
      if (last.file == f.file && last.begin + last.count == f.begin &&
          last.offset_bytes + last.count * item == f.offset_bytes) {
        last.count += f.count;
        continue;
      }
    }
    result.push_back(f);
  }
  return result;
}

class TensorMerge {
 public:
  using SplitOf =
      std::function<TensorSplit(const std::string&, const std::vector<std::optional<Shape>>&)>;

  TensorMerge(ShardedState* whole, const std::vector<MpPart>& parts, SplitOf split_of)
      : whole_(*whole),
        parts_(parts),
        split_by_shapes_(std::move(split_of)),
        by_name_(parts.size()),
        scalar_texts_(*whole) {
    for (size_t t = 0; t < parts.size(); ++t) {
      for (const ParameterState& parameter : parts[t].state.parameters)
        by_name_[t].emplace(parameter.name, &parameter);
    }
  }

  void run_experts() {
    check_parts();
    for (const std::string& name : order()) {
      merge_parameter(name);
      whole_.enlist(static_cast<int>(whole_.parameters.size()) - 1);
    }
    whole_.stepped = whole_.stepped || first().stepped;
  }

  void run() {
    check_parts();
    whole_.flavour = first().flavour;
    whole_.stage = first().stage;
    whole_.round_robin = first().round_robin;
    whole_.module_order = first().module_order;
    whole_.split_file = parts_[0].model.file;
    for (const MpPart& part : parts_) {
      whole_.stepped = whole_.stepped || part.state.stepped;
      add_once(&whole_.notices, part.state.notices);
      add_once(&whole_.skipped, part.state.skipped);
    }
    for (const std::string& name : order()) merge_parameter(name);
    merge_groups();
    merge_buffers();
    merge_aliases();
  }

 private:
  using Shards = std::vector<const ParameterState*>;  // by rank

  const ShardedState& first() const { return parts_[0].state; }
  [[noreturn]] void refuse(const std::string& what, size_t rank, const std::string& entry,
                           const std::string& expected, const std::string& found) const {
    throw Error(ErrorInfo{
        .code = ErrorCode::kMismatch,
        .what = what,
        .file = whole_.document(parts_[rank].model.file).path(),
        .entry = entry,
        .expected = expected,
        .found = found,
        .next = "put the files of one save together; compare the mp_rank files' times and steps"});
  }

  void check_parts() const;
  std::vector<std::string> order() const;
  void merge_parameter(const std::string& name);
  void check_scalars(size_t rank, const ParameterState& shard, const ParameterState& lead);
  TensorSplit split_of(const std::string& name, const Shards& shards) const;
  int merge_leaves(const TensorSplit& split, const std::string& name,
                   const std::vector<const Leaf*>& shards);
  int add_padding(const TensorSplit& split, Leaf leaf, const std::vector<const Leaf*>& shards);
  void add_replicas(const TensorSplit& split, int whole, const std::vector<const Leaf*>& shards);
  int add_mean(const TensorSplit& split, Leaf leaf, const std::vector<const Leaf*>& shards);
  void merge_groups();
  void merge_buffers();
  void merge_aliases();
  const Leaf* leaf_of(size_t rank, int number) const {
    return number < 0 ? nullptr : &parts_[rank].state.leaf(number);
  }

  ShardedState& whole_;
  const std::vector<MpPart>& parts_;
  const SplitOf split_by_shapes_;
  std::vector<std::unordered_map<std::string, const ParameterState*>> by_name_;
  ScalarTexts scalar_texts_;
};

void TensorMerge::check_parts() const {
  for (size_t t = 1; t < parts_.size(); ++t) {
    const ModelStates &a = parts_[0].model, &b = parts_[t].model;
    const ShardedState &x = parts_[0].state, &y = parts_[t].state;
    if (a.global_steps != b.global_steps || a.version != b.version)
      refuse("Two tensor-parallel ranks' model files do not belong together.", t,
             "global_steps, ds_version",
             "as in mp rank 0: step " + std::to_string(a.global_steps) + ", " + a.version,
             "step " + std::to_string(b.global_steps) + ", " + b.version);
    if (x.flavour != y.flavour || x.stage != y.stage || x.groups.size() != y.groups.size())
      refuse("Tensor-parallel ranks have different forms.", t, "stage, groups",
             std::string(name(x.flavour)) + ", " + std::to_string(x.groups.size()) + " groups",
             std::string(name(y.flavour)) + ", " + std::to_string(y.groups.size()) + " groups");
    if (a.tp_degree != b.tp_degree || a.pp_degree != b.pp_degree)
      refuse("mp ranks disagree on their degrees (DeepSpeed: RuntimeError).", t,
             "checkpoint_parallel_dimensions",
             "tp " + std::to_string(a.tp_degree) + ", pp " + std::to_string(a.pp_degree),
             "tp " + std::to_string(b.tp_degree) + ", pp " + std::to_string(b.pp_degree));
    if (a.dp_world != b.dp_world)
      refuse("Tensor-parallel ranks have different partition groups.", t, "dp_world_size",
             std::to_string(a.dp_world), std::to_string(b.dp_world));
  }
}

// Every name once: rank 0's order, then what only others name, which is refused by its turn.
std::vector<std::string> TensorMerge::order() const {
  std::vector<std::string> result;
  std::unordered_set<std::string> known;
  // shared_params stands in rank 0's file only; elsewhere a second name looks like a frozen one.
  for (const Alias& alias : first().aliases) known.insert(alias.name);
  for (const ParameterState& parameter : first().parameters) {
    result.push_back(parameter.name);
    known.insert(parameter.name);
  }
  for (size_t t = 1; t < parts_.size(); ++t) {
    for (const ParameterState& parameter : parts_[t].state.parameters) {
      if (known.insert(parameter.name).second) result.push_back(parameter.name);
    }
  }
  return result;
}

TensorSplit TensorMerge::split_of(const std::string& name, const Shards& shards) const {
  std::vector<std::optional<Shape>> shapes;
  const bool trained =
      std::ranges::any_of(shards, [](const ParameterState* shard) { return shard->group >= 0; });
  for (const ParameterState* shard : shards) {
    // Without an element it looks frozen; at stage 3 the module does not tell its shape either.
    const bool empty = trained && shard->group < 0 && numel(shard->shape) == 0;
    shapes.push_back(empty ? std::nullopt : std::optional<Shape>(shard->shape));
  }
  return split_by_shapes_(name, shapes);
}

void TensorMerge::merge_parameter(const std::string& name) {
  Shards shards;
  const ParameterState* lead = nullptr;  // the first that the optimizer owns, or the first
  size_t lead_rank = 0;
  for (size_t t = 0; t < parts_.size(); ++t) {
    const auto found = by_name_[t].find(name);
    if (found == by_name_[t].end())
      refuse("A rank's files do not name a parameter that others hold.", t, quote(name), "present",
             "absent");
    const ParameterState* shard = found->second;
    shards.push_back(shard);
    if (lead == nullptr || (lead->group < 0 && shard->group >= 0)) {
      lead = shard;
      lead_rank = t;
    }
  }
  whole_.splits.push_back(split_of(name, shards));
  const TensorSplit& split = whole_.splits.back();
  ParameterState result{.name = name,
                        .shape = logical_shape(split),
                        .group = lead->group,
                        .sub_group = lead->sub_group,
                        .model_dtype = lead->model_dtype,
                        .split = static_cast<int>(whole_.splits.size()) - 1,
                        .states = {},
                        .scalars = lead->scalars};
  std::vector<const Leaf*> weights, copies;
  for (size_t t = 0; t < shards.size(); ++t) {
    const ParameterState* shard = shards[t];
    // What the optimizer does not own although it owns other shards has no element.
    const bool empty = lead->group >= 0 && shard->group < 0;
    if (empty && numel(shard->shape) != 0)
      refuse("A shard is trained on one rank and frozen on another.", t, quote(name),
             "as in " + rank_name(lead_rank), "frozen");
    if (!empty && shard->group != lead->group)
      refuse("A parameter stands in different groups.", t, quote(name),
             "group " + std::to_string(lead->group), "group " + std::to_string(shard->group));
    if (shard->model_dtype != lead->model_dtype)
      refuse("Shards have different dtypes.", t, quote(name), isoshard::name(lead->model_dtype),
             isoshard::name(shard->model_dtype));
    if (!empty) check_scalars(t, *shard, *lead);
    if (!empty && shard->states.size() != lead->states.size())
      refuse("Ranks disagree on the optimizer's states.", t, quote(name),
             std::to_string(lead->states.size()) + " states", std::to_string(shard->states.size()));
    weights.push_back(empty ? nullptr : leaf_of(t, shard->weight));
    copies.push_back(empty ? nullptr : leaf_of(t, shard->model_copy));
  }
  if (lead->weight >= 0) result.weight = merge_leaves(split, name, weights);
  if (lead->model_copy >= 0 && split.kind != SplitKind::kAveraged)
    result.model_copy = merge_leaves(split, name, copies);
  for (size_t s = 0; s < lead->states.size(); ++s) {
    const std::string& state = leaf_of(lead_rank, lead->states[s])->state;
    std::vector<const Leaf*> leaves;
    for (size_t t = 0; t < shards.size(); ++t) {
      const Leaf* found = nullptr;
      for (int number : shards[t]->states) {
        if (leaf_of(t, number)->state == state) found = leaf_of(t, number);
      }
      leaves.push_back(found);
    }
    result.states.push_back(merge_leaves(split, name, leaves));
  }
  whole_.parameters.push_back(std::move(result));
}

// Shards of one parameter stand at the same step.
void TensorMerge::check_scalars(size_t rank, const ParameterState& shard,
                                const ParameterState& lead) {
  const std::string expected = scalar_texts_.of(lead.scalars);
  const std::string found = scalar_texts_.of(shard.scalars);
  if (expected != found)
    refuse("Ranks stand at different steps: files of two saves are mixed.", rank, quote(lead.name),
           expected, found);
}

int TensorMerge::merge_leaves(const TensorSplit& split, const std::string& name,
                              const std::vector<const Leaf*>& shards) {
  const auto lead = std::find_if(shards.begin(), shards.end(), [](const Leaf* l) { return l; });
  CHECK(lead != shards.end(), "no shard of " + name);
  Leaf leaf = **lead;
  leaf.shape = logical_shape(split);
  for (size_t t = 0; t < shards.size(); ++t) {
    const int64_t expected = numel(split.map.ranks[t].shard_shape);
    const int64_t found = shards[t] == nullptr ? 0 : shards[t]->size_elements();
    if (found != expected)
      refuse("A rank lacks a state of a parameter that others hold.", t,
             quote(name) + " " + leaf.state, std::to_string(expected) + " elements",
             std::to_string(found));
    if (shards[t] != nullptr && shards[t]->dtype != leaf.dtype)
      refuse("Ranks disagree on a state's dtype.", t, quote(name) + " " + leaf.state,
             isoshard::name(leaf.dtype), isoshard::name(shards[t]->dtype));
  }
  if (split.kind == SplitKind::kAveraged) return add_mean(split, std::move(leaf), shards);
  leaf.fragments.clear();
  if (whole_.has_places) leaf.fragments = compose(split, shards);
  leaf.padding = add_padding(split, leaf, shards);
  const int number = whole_.add_leaf(std::move(leaf));
  if (whole_.has_places) add_replicas(split, number, shards);
  return number;
}

// What a padded vocabulary holds behind its last row: no state, but the same ranks may keep it.
int TensorMerge::add_padding(const TensorSplit& split, Leaf leaf,
                             const std::vector<const Leaf*>& shards) {
  const int64_t rows = split.vocabulary ? split.map.logical_shape.at(0) - leaf.shape.at(0) : 0;
  if (rows <= 0 || !whole_.has_places) return -1;
  leaf.shape[0] = rows;
  leaf.fragments = compose(split, shards, /*padding=*/true);
  return whole_.add_leaf(std::move(leaf));
}

void TensorMerge::add_replicas(const TensorSplit& split, int whole,
                               const std::vector<const Leaf*>& shards) {
  const std::string name = whole_.leaf(whole).name;
  const DType dtype = whole_.leaf(whole).dtype;
  const auto partial = [&](const MapPiece& piece, size_t rank) {
    Leaf leaf{.name = name,
              .state = rank_name(rank),
              .dtype = dtype,
              .shape = piece.shape,
              .fragments = {}};
    int64_t at = 0;
    for (MapRun run : piece_runs(piece)) {
      run.source = at;
      append_fragments(*shards[rank], run.dest, run.count, run.source, &leaf.fragments);
      at += run.count;
    }
    return whole_.add_leaf(std::move(leaf));
  };
  for (size_t t = 1; t < shards.size(); ++t) {
    for (const MapPiece& piece : split.map.ranks[t].pieces) {
      const auto lead = static_cast<size_t>(piece.locations.front());
      if (lead == t || numel(piece.shape) == 0) continue;
      int first = whole;
      if (!is_replicated(split.map) || split.vocabulary) {
        for (const MapPiece& other : split.map.ranks[lead].pieces) {
          const bool same =
              other.shape == piece.shape && other.source_offset == piece.source_offset &&
              other.source_stride == piece.source_stride && other.locations == piece.locations;
          if (same && first == whole) first = partial(other, lead);
        }
      }
      whole_.replicas.emplace_back(first, partial(piece, t));
    }
  }
}

int TensorMerge::add_mean(const TensorSplit& split, Leaf leaf,
                          const std::vector<const Leaf*>& shards) {
  if (whole_.model_files_only) {
    throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                          .what = "A parameter is the mean of its ranks' own values: the model "
                                  "files hold no value for all.",
                          .file = whole_.document(parts_[0].model.file).path(),
                          .entry = quote(leaf.name),
                          .expected = "the optimizer's masters",
                          .found = "model files alone",
                          .next = "take the mean of the masters: export --dtype fp32"});
  }
  if (leaf.dtype != DType::kFloat32)
    refuse("The mean of an averaged parameter is taken in float32 only.", 0, quote(leaf.name),
           "float32", isoshard::name(leaf.dtype));
  for (size_t t = 0; t < shards.size(); ++t) {
    if (shards[t] == nullptr)
      refuse("A rank lacks an averaged parameter.", t, quote(leaf.name), "present", "absent");
    Leaf witness = *shards[t];
    witness.state += ", " + rank_name(t);
    whole_.witnesses.push_back(whole_.add_leaf(std::move(witness)));
  }
  const int64_t bytes = numel(split.map.logical_shape) * item_size_bytes(leaf.dtype);
  leaf.fragments.clear();
  if (bytes > 0 && whole_.has_places) {
    std::vector<std::vector<FileFragment>> places;
    for (const Leaf* shard : shards) places.push_back(shard->fragments);
    const std::string title = "(mean of " + leaf.name + " " + leaf.state + ")";
    whole_.files.push_back({title, title, nullptr,
                            std::make_shared<MeanFile>(title, whole_.files, std::move(places)),
                            /*inside=*/false});
    leaf.fragments = {{0, numel(leaf.shape), static_cast<int>(whole_.files.size()) - 1, 0}};
  }
  return whole_.add_leaf(std::move(leaf));
}

void TensorMerge::merge_groups() {
  for (size_t g = 0; g < first().groups.size(); ++g) {
    GroupState group;
    group.hyper = first().groups[g].hyper;
    for (size_t i = 0; i < whole_.parameters.size(); ++i) {
      if (whole_.parameters[i].group == static_cast<int>(g))
        group.parameters.push_back(static_cast<int>(i));
    }
    group.flat_order = group.parameters;
    whole_.groups.push_back(std::move(group));
  }
  if (!whole_.round_robin) return;
  // The order of the flat buffers differs from the optimizer's; parameters stand in the former.
  for (GroupState& group : whole_.groups) {
    const auto& part = first().groups[static_cast<size_t>(&group - whole_.groups.data())];
    std::unordered_map<std::string, size_t> place;
    for (size_t i = 0; i < part.parameters.size(); ++i)
      place[first().parameters[static_cast<size_t>(part.parameters[i])].name] = i;
    std::stable_sort(group.parameters.begin(), group.parameters.end(), [&](int a, int b) {
      const auto at = [&](int number) {  // what rank 0 does not name comes last
        const auto found = place.find(whole_.parameters[static_cast<size_t>(number)].name);
        return found == place.end() ? part.parameters.size() : found->second;
      };
      return at(a) < at(b);
    });
  }
}

// No list speaks of buffers: they are the same on every rank, or it is not known what they are.
void TensorMerge::merge_buffers() {
  for (size_t t = 1; t < parts_.size(); ++t) {
    if (parts_[t].state.buffers.size() != first().buffers.size())
      refuse("Ranks have different buffers.", t, "buffer_names",
             std::to_string(first().buffers.size()),
             std::to_string(parts_[t].state.buffers.size()));
  }
  for (const BufferState& buffer : first().buffers) {
    const int number = whole_.add_leaf(first().leaf(buffer.leaf));
    whole_.buffers.push_back({buffer.name, number});
    for (size_t t = 1; t < parts_.size(); ++t) {
      const std::vector<BufferState>& others = parts_[t].state.buffers;
      const auto other = std::find_if(others.begin(), others.end(),
                                      [&](const BufferState& b) { return b.name == buffer.name; });
      if (other == others.end())
        refuse("A buffer is missing on a rank.", t, quote(buffer.name), "present", "absent");
      Leaf copy = parts_[t].state.leaf(other->leaf);
      if (copy.shape != whole_.leaf(number).shape || copy.dtype != whole_.leaf(number).dtype)
        refuse("Ranks hold different shapes of a buffer; nothing records how it is split.", t,
               quote(buffer.name), to_string(whole_.leaf(number).shape), to_string(copy.shape));
      copy.state = rank_name(t);
      whole_.replicas.emplace_back(number, whole_.add_leaf(std::move(copy)));
    }
  }
}

void TensorMerge::merge_aliases() {
  for (const Alias& alias : first().aliases) {
    Alias result{alias.name, alias.target, -1, alias.recorded};
    const ParameterState* target = whole_.find_parameter(alias.target);
    if (target != nullptr && alias.model_copy >= 0) {
      const TensorSplit& split = whole_.split_of(*target);
      std::vector<const Leaf*> shards;
      for (size_t t = 0; t < parts_.size(); ++t) {
        const std::vector<Alias>& others = parts_[t].state.aliases;
        const auto other = std::find_if(others.begin(), others.end(),
                                        [&](const Alias& a) { return a.name == alias.name; });
        const auto named = by_name_[t].find(alias.name);
        shards.push_back(other != others.end()        ? leaf_of(t, other->model_copy)
                         : named != by_name_[t].end() ? leaf_of(t, named->second->weight)
                                                      : nullptr);
      }
      if (split.kind != SplitKind::kAveraged)
        result.model_copy = merge_leaves(split, alias.name, shards);
    }
    whole_.aliases.push_back(std::move(result));
  }
}

}  // namespace

std::string rank_name(size_t rank) { return "tp rank " + std::to_string(rank); }

void add_once(std::vector<std::string>* list, const std::vector<std::string>& more) {
  for (const std::string& text : more) {
    if (std::find(list->begin(), list->end(), text) == list->end()) list->push_back(text);
  }
}

MpPart lend_files(ShardedState* whole, ModelStates model) {
  MpPart part{.state = {}, .model = std::move(model)};
  part.state.folder = whole->folder;
  part.state.topology = whole->topology;
  part.state.has_places = whole->has_places;
  part.state.version = whole->version;
  part.state.files = std::move(whole->files);
  return part;
}

std::vector<FileFragment> compose(const TensorSplit& split, const std::vector<const Leaf*>& shards,
                                  bool padding) {
  std::vector<FileFragment> result;
  int64_t item = 1;
  for (size_t t = 0; t < shards.size(); ++t) {
    if (shards[t] == nullptr) continue;
    item = item_size_bytes(shards[t]->dtype);
    for (const MapPiece& piece : split.map.ranks[t].pieces) {
      if (piece.locations.front() != static_cast<int>(t)) continue;
      for (const MapRun& run : piece_runs(piece))
        append_fragments(*shards[t], run.dest, run.count, run.source, &result);
    }
  }
  const int64_t total = numel(logical_shape(split));
  return padding ? tidy(std::move(result), total, numel(split.map.logical_shape), item)
                 : tidy(std::move(result), 0, total, item);
}

void merge_tensor_ranks(ShardedState* whole, const std::vector<MpPart>& parts,
                        const TensorParallelInfo& info) {
  TensorMerge(whole, parts, std::bind_front(&TensorParallelInfo::split_of, &info)).run();
}

void merge_expert_ranks(ShardedState* whole, const std::vector<MpPart>& parts,
                        const ExpertInfo& experts) {
  TensorMerge(whole, parts, std::bind_front(&ExpertInfo::split_of, &experts)).run_experts();
}

}  // namespace isoshard::checkpoint
