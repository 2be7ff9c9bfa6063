// See experts.h.
#include "checkpoint/deepspeed/experts.h"

#include <algorithm>
#include <charconv>
#include <set>

#include "core/error.h"
#include "core/split_rules.h"

namespace isoshard::checkpoint {
namespace {

constexpr const char* kNative = ".deepspeed_moe.experts.deepspeed_experts.";

NodeId need(const Fields& fields, NodeId entry, const char* key) {
  const NodeId node = fields.maybe(entry, key);
  if (node == kNoNode)
    fields.fail("AutoEP metadata lacks a field (DeepSpeed: RuntimeError).", key, "present",
                "absent");
  return node;
}

int64_t positive(const Fields& fields, NodeId entry, const char* key) {
  const int64_t value = fields.integer(need(fields, entry, key), key);
  if (value < 1 || value > 1'000'000)
    fields.fail("A count of AutoEP metadata is impossible (DeepSpeed: RuntimeError).", key,
                "a positive number", std::to_string(value));
  return value;
}

}  // namespace

std::vector<std::vector<int64_t>> placed_in_blocks(int64_t experts, int64_t ranks) {
  std::vector<std::vector<int64_t>> placement;
  int64_t id = 0;
  for (int64_t width : split_widths({}, experts, static_cast<int>(ranks), "")) {
    std::vector<int64_t>& own = placement.emplace_back();
    while (width-- > 0) own.push_back(id++);
  }
  return placement;
}

std::string router_of(const ExpertLayer& layer) {
  return (layer.module_path.empty() ? "" : layer.module_path + ".") + "router.";
}

NodeId autoep_layers(const Fields& fields, NodeId holder) {
  const NodeId list = fields.maybe(holder, "ds_autoep_layers");
  return list != kNoNode ? list : fields.maybe(holder, "autoep_layers");
}

std::optional<std::vector<NodeId>> expert_counts(const Fields& fields) {
  const NodeId list = fields.maybe(fields.root(), "num_experts");
  if (list == kNoNode || fields.pickle().kind(list) != Kind::kList) return std::nullopt;
  return fields.pickle().items(list);
}

bool is_group_of_experts(const Fields& fields, NodeId hyper) {
  const NodeId flag = fields.maybe(hyper, "moe");
  return flag != kNoNode && fields.pickle().kind(flag) == Kind::kBool && fields.truth(hyper, "moe");
}

ExpertInfo::ExpertInfo(const ShardedState& state, const ModelStates& model)
    : path_(state.document(model.file).path()) {
  const Fields fields(state.document(model.file));
  if (const NodeId list = autoep_layers(fields, fields.root()); list != kNoNode)
    read_layers(fields, list);
  for (const NamedShapes& group : model.param_shapes) {
    for (const auto& [name, shape] : group) native_ = native_ || expert_number(name).has_value();
  }
  const NodeId flag = model.config == kNoNode
                          ? kNoNode
                          : fields.maybe(model.config, "use_data_before_expert_parallelism");
  if (flag != kNoNode && fields.pickle().kind(flag) != Kind::kBool)
    fields.fail("A value has the wrong type (DeepSpeed: RuntimeError).",
                "use_data_before_expert_parallelism", "bool", name(fields.pickle().kind(flag)));
  data_before_expert_ =
      flag != kNoNode && fields.truth(model.config, "use_data_before_expert_parallelism");
}

void ExpertInfo::read_layers(const Fields& fields, NodeId list) {
  if (fields.pickle().kind(list) != Kind::kList)
    fields.fail("AutoEP metadata is not a list (DeepSpeed: RuntimeError).", "ds_autoep_layers",
                "list", name(fields.pickle().kind(list)));
  std::set<int64_t> ids;
  for (NodeId entry : fields.pickle().items(list)) {
    if (!fields.pickle().is_mapping(entry))
      fields.fail("AutoEP metadata is malformed (DeepSpeed: RuntimeError).", "ds_autoep_layers",
                  "dict", name(fields.pickle().kind(entry)));
    ExpertLayer layer;
    layer.layer_id = fields.integer(need(fields, entry, "moe_layer_id"), "moe_layer_id");
    layer.module_path = fields.text(need(fields, entry, "module_path"), "module_path");
    layer.prefix = fields.text(need(fields, entry, "expert_key_prefix"), "expert_key_prefix");
    layer.experts = positive(fields, entry, "num_experts");
    layer.ep_size = positive(fields, entry, "ep_size");
    if (fields.maybe(entry, "expert_placement") == kNoNode)
      read_blocks(fields, entry, &layer);
    else
      read_placement(fields, entry, &layer);
    const bool twice = !ids.insert(layer.layer_id).second || by_prefix_.contains(layer.prefix) ||
                       std::ranges::any_of(layers_, [&](const ExpertLayer& other) {
                         return other.module_path == layer.module_path;
                       });
    if (twice || layer.prefix.empty())
      fields.fail("An AutoEP layer stands twice (DeepSpeed: RuntimeError).",
                  "moe_layer_id, expert_key_prefix", "each once",
                  std::to_string(layer.layer_id) + " " + quote(layer.prefix));
    if (!layers_.empty() && layer.ep_size != layers_[0].ep_size)
      fields.fail("AutoEP layers have several expert-parallel sizes (DeepSpeed: RuntimeError).",
                  "ep_size", std::to_string(layers_[0].ep_size), std::to_string(layer.ep_size));
    by_prefix_.emplace(layer.prefix, layers_.size());
    layers_.push_back(std::move(layer));
  }
}

// Equal blocks where nothing is recorded (before 0.19.8, and in universal folders).
void ExpertInfo::read_blocks(const Fields& fields, NodeId entry, ExpertLayer* layer) const {
  const int64_t local = positive(fields, entry, "num_local_experts");
  layer->placement = placed_in_blocks(layer->experts, layer->ep_size);
  if (layer->experts == local * layer->ep_size) return;
  fields.fail("The placement of experts is invalid (DeepSpeed: RuntimeError).",
              "num_experts of " + quote(layer->prefix),
              std::to_string(local * layer->ep_size) + " experts", std::to_string(layer->experts));
}

void ExpertInfo::read_placement(const Fields& fields, NodeId entry, ExpertLayer* layer) const {
  const auto wrong = [&](const std::string& expected, const std::string& found) {
    fields.fail("The placement of experts is invalid (DeepSpeed: RuntimeError).",
                "expert_placement of " + quote(layer->prefix), expected, found);
  };
  layer->placement.resize(static_cast<size_t>(layer->ep_size));
  const NodeId node = fields.maybe(entry, "expert_placement");
  const int64_t version = fields.integer(fields.need(node, "version"), "expert_placement version");
  if (version != 1) wrong("version 1", std::to_string(version));
  if (positive(fields, node, "num_experts") != layer->experts ||
      positive(fields, node, "ep_size") != layer->ep_size)
    wrong("num_experts and ep_size of its layer", "others");
  std::set<int64_t> placed, ranks;
  for (NodeId item : fields.list(fields.need(node, "ranks"), "ranks")) {
    const int64_t rank = fields.integer(fields.need(item, "rank"), "rank");
    if (rank < 0 || rank >= layer->ep_size || !ranks.insert(rank).second)
      wrong("each rank below " + std::to_string(layer->ep_size) + " once", std::to_string(rank));
    std::vector<int64_t>& experts = layer->placement[static_cast<size_t>(rank)];
    for (NodeId id : fields.list(fields.need(item, "experts"), "experts")) {
      experts.push_back(fields.integer(id, "experts"));
      const bool fits = experts.back() >= 0 && experts.back() < layer->experts;
      if (!fits || !placed.insert(experts.back()).second)
        wrong("each expert below " + std::to_string(layer->experts) + " once",
              std::to_string(experts.back()));
    }
  }
  if (static_cast<int64_t>(ranks.size()) != layer->ep_size)
    wrong(std::to_string(layer->ep_size) + " ranks", std::to_string(ranks.size()));
  if (static_cast<int64_t>(placed.size()) != layer->experts)
    wrong("all " + std::to_string(layer->experts) + " experts", std::to_string(placed.size()));
  // The entry's count is its own rank's; the other ranks may hold more or fewer.
  const NodeId own = fields.maybe(entry, "ep_rank");
  const int64_t rank = own == kNoNode ? 0 : fields.integer(own, "ep_rank");
  if (rank < 0 || rank >= layer->ep_size) wrong("an ep_rank that it has", std::to_string(rank));
  const int64_t local = fields.integer(need(fields, entry, "num_local_experts"), "experts");
  if (local != layer->held_by(static_cast<int>(rank)))
    wrong(std::to_string(local) + " experts on rank " + std::to_string(rank),
          std::to_string(layer->held_by(static_cast<int>(rank))));
}

const ExpertLayer* ExpertInfo::layer_of(const std::string& name) const {
  if (name.size() < 4) return nullptr;
  const std::string end = name.substr(name.size() - 3);
  if (end != ".w1" && end != ".w2" && end != ".w3") return nullptr;
  const auto found = by_prefix_.find(name.substr(0, name.size() - 3));
  return found == by_prefix_.end() ? nullptr : &layers_[found->second];
}

const ExpertLayer* ExpertInfo::layer_around(const std::string& name) const {
  for (const ExpertLayer& layer : layers_) {
    if (layer.module_path.empty() || name.starts_with(layer.module_path + ".")) return &layer;
  }
  return nullptr;
}

ModelStates ExpertInfo::with_router_aliases(const ShardedState& state,
                                            const ModelStates& model) const {
  ModelStates result = model;
  if (!autoep()) return result;
  const Fields fields(state.document(model.file));
  std::map<std::string, Shape> shapes;
  for (const auto& [name, node] : model.module) shapes[name] = fields.tensor(node, name).shape;
  std::set<std::string> trained;
  for (const NamedShapes& group : model.param_shapes) {
    for (const auto& [name, shape] : group) trained.insert(name);
  }
  // At stage 3 all entries of the module are empty: shapes tell nothing there.
  std::set<std::string> frozen;
  for (const auto& [name, shape] : model.frozen_shapes) frozen.insert(name);
  for (const auto& [name, shape] : shapes) {
    const ExpertLayer* layer = layer_around(name);
    if (layer == nullptr || trained.contains(name) || frozen.contains(name)) continue;
    const std::string front = layer->module_path.empty() ? "" : layer->module_path + ".";
    const size_t dot = name.find('.', front.size());
    if (dot == std::string::npos) continue;
    const auto router = shapes.find(front + "router" + name.substr(dot));
    if (router == shapes.end() || router->first == name || router->second != shape) continue;
    if (result.shared.emplace(name, router->first).second) result.unrecorded.insert(name);
  }
  return result;
}

ModelStates ExpertInfo::of_rank(const ModelStates& model, int rank) const {
  ModelStates result = model;
  for (NamedShapes& group : result.param_shapes) {
    for (auto& [name, shape] : group) {
      const ExpertLayer* layer = layer_of(name);
      if (layer == nullptr || shape.empty() || shape[0] != layer->held_by(0)) continue;
      shape[0] = layer->held_by(rank);
    }
  }
  return result;
}

bool ExpertInfo::is_expert(const std::string& name) const {
  return layer_of(name) != nullptr || expert_number(name).has_value();
}

std::optional<std::pair<std::string, int64_t>> ExpertInfo::expert_number(const std::string& name) {
  const size_t at = name.find(kNative);
  if (at == std::string::npos) return std::nullopt;
  const size_t begin = at + std::char_traits<char>::length(kNative);
  int64_t number = -1;
  const char* end = name.data() + name.size();
  const auto [stop, error] = std::from_chars(name.data() + begin, end, number);
  if (error != std::errc() || stop == end || *stop != '.' || number < 0 || number > 1'000'000)
    return std::nullopt;
  return std::pair(name.substr(0, begin), number);
}

std::string ExpertInfo::global_name(const std::string& name, int rank, int64_t local) {
  const auto number = expert_number(name);
  const std::string& front = number->first;
  const std::string back = name.substr(name.find('.', front.size()));
  return front + std::to_string(rank * local + number->second) + back;
}

int ExpertInfo::expert_ranks(int dp, int64_t partition_count) const {
  const bool divides = partition_count > 0 && dp % partition_count == 0;
  const int64_t found = divides ? dp / partition_count : 0;
  const int64_t expected = layers_.empty() ? found : layers_[0].ep_size;
  if (found > 0 && found == expected) return static_cast<int>(found);
  throw Error(
      ErrorInfo{.code = ErrorCode::kMismatch,
                .what = "The experts' partition group does not fit the expert-parallel size.",
                .file = path_,
                .entry = "partition_count of the experts' group",
                .expected = std::to_string(expected > 0 && dp % expected == 0 ? dp / expected : 1) +
                            " of " + std::to_string(dp) + " ranks",
                .found = std::to_string(partition_count),
                .next = "files of two saves may be mixed; compare their times and steps"});
}

std::vector<int> ExpertInfo::partition_ranks(int rank, int expert_ranks, int dp) const {
  std::vector<int> ranks;
  const int replicas = dp / expert_ranks;
  for (int k = 0; k < replicas; ++k)
    ranks.push_back(data_before_expert_ ? rank * replicas + k : rank + k * expert_ranks);
  return ranks;
}

std::vector<std::optional<Shape>> ExpertInfo::shards_of(const ExpertLayer& layer,
                                                        const Shape& first) const {
  std::vector<std::optional<Shape>> shards(static_cast<size_t>(layer.ep_size), first);
  for (size_t rank = 1; rank < shards.size() && !first.empty(); ++rank)
    shards[rank]->at(0) = layer.held_by(static_cast<int>(rank));
  return shards;
}

TensorSplit ExpertInfo::split_of(const std::string& name,
                                 const std::vector<std::optional<Shape>>& shards) const {
  const ExpertLayer& layer = *layer_of(name);
  const std::optional<Shape>& lead = shards.at(0);
  const auto refuse = [&](const std::string& expected, const std::string& found) {
    throw Error(ErrorInfo{.code = ErrorCode::kMismatch,
                          .what = "An expert tensor does not fit its layer's metadata (DeepSpeed: "
                                  "RuntimeError).",
                          .file = path_,
                          .entry = quote(name),
                          .expected = expected,
                          .found = found});
  };
  if (static_cast<int64_t>(shards.size()) != layer.ep_size)
    refuse(std::to_string(layer.ep_size) + " ranks", std::to_string(shards.size()));
  if (!lead || lead->size() != 3)
    refuse("three dimensions on rank 0", lead ? to_string(*lead) : "none");
  for (size_t rank = 0; rank < shards.size(); ++rank) {
    const Shape expected{layer.held_by(static_cast<int>(rank)), (*lead)[1], (*lead)[2]};
    if (shards[rank] ? *shards[rank] != expected : expected[0] != 0)
      refuse(to_string(expected) + " on rank " + std::to_string(rank),
             shards[rank] ? to_string(*shards[rank]) : "none");
  }
  return stack_split(layer, (*lead)[1], (*lead)[2]);
}

TensorSplit stack_split(const ExpertLayer& layer, int64_t rows, int64_t columns) {
  TensorSplit split;
  split.axis = Axis::kExpert;
  split.kind = SplitKind::kExperts;
  split.map.logical_shape = {layer.experts, rows, columns};
  const Shape stride = {rows * columns, columns, 1};
  for (size_t rank = 0; rank < layer.placement.size(); ++rank) {
    const std::vector<int64_t>& ids = layer.placement[rank];
    RankMap part{{static_cast<int64_t>(ids.size()), rows, columns}, {}};
    for (size_t begin = 0; begin < ids.size();) {  // stretches of consecutive ids
      size_t end = begin + 1;
      while (end < ids.size() && ids[end] == ids[end - 1] + 1) ++end;
      part.pieces.push_back({.shape = {static_cast<int64_t>(end - begin), rows, columns},
                             .source_offset = ids[begin] * stride[0],
                             .source_stride = stride,
                             .dest_offset = static_cast<int64_t>(begin) * stride[0],
                             .dest_stride = stride,
                             .locations = {static_cast<int>(rank)}});
      begin = end;
    }
    split.map.ranks.push_back(std::move(part));
  }
  return split;
}

}  // namespace isoshard::checkpoint
