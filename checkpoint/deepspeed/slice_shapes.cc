// See slice_shapes.h.
#include "checkpoint/deepspeed/slice_shapes.h"

#include <algorithm>
#include <unordered_map>

#include "checkpoint/deepspeed/fields.h"
#include "checkpoint/deepspeed/pipeline.h"
#include "checkpoint/deepspeed/zero_files.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

// The parameters of one group in flat order, with the elements that all ranks have of each.
std::vector<std::pair<std::string, int64_t>> slices_of(const ShardedState& part, size_t group) {
  std::vector<std::pair<std::string, int64_t>> found;
  std::unordered_map<std::string, size_t> places;
  for (int file : part.optim_files) {
    const Fields f(part.document(file));
    const NodeId optimizer = f.need(f.root(), "optimizer_state_dict");
    const std::vector<NodeId>& maps =
        f.list(f.need(optimizer, "param_slice_mappings"), "param_slice_mappings");
    if (group >= maps.size())
      f.fail("Ranks have different numbers of groups.", "param_slice_mappings",
             std::to_string(group + 1), std::to_string(maps.size()));
    std::vector<std::pair<int64_t, std::pair<std::string, int64_t>>> by_start;
    for (const auto& [name, node] : f.named(maps[group], "param_slice_mappings")) {
      const NodeId slice = f.state_of(node);
      if (slice == kNoNode) f.fail("A slice has no place.", quote(name), "start and numel", "none");
      const int64_t count = f.integer(f.need(slice, "numel"), "numel");
      if (count < 0) f.fail("A slice has an impossible length.", quote(name), "0 or more", "less");
      by_start.push_back({f.integer(f.need(slice, "start"), "start"), {name, count}});
    }
    std::ranges::stable_sort(by_start, {}, [](const auto& entry) { return entry.first; });
    for (const auto& [start, slice] : by_start) {
      const auto [known, fresh] = places.emplace(slice.first, found.size());
      if (fresh)
        found.push_back(slice);
      else if (known->second + 1 == found.size())
        found.back().second += slice.second;  // it goes on from the rank before
      else
        f.fail("A parameter's slices do not follow each other.", quote(slice.first),
               "the end of a rank and the start of the next", "another parameter between them");
    }
  }
  return found;
}

Shape shape_of(const ShardedState& part, const LayerShapes& layers, const std::string& name,
               int64_t count) {
  std::vector<Shape> fitting;
  const auto look = [&](const std::map<std::string, Shape>& layer, const std::string& local) {
    const auto found = layer.find(local);
    if (found == layer.end() || numel(found->second) != count) return;
    if (std::ranges::find(fitting, found->second) == fitting.end())
      fitting.push_back(found->second);
  };
  if (const int layer = layer_in_name(name); layer != kNoLayer) {
    if (const auto file = layers.find(layer); file != layers.end())
      look(file->second, name.substr(name.find('.') + 1));
  } else if (const std::string key = tied_key(name); !key.empty()) {
    const std::string front = "tied_modules." + key + ".";
    for (const auto& [layer, tensors] : layers)
      look(tensors, name.starts_with(front) ? name.substr(front.size()) : name);
  }
  if (fitting.size() == 1) return fitting[0];
  part.refuse(fitting.empty() ? ErrorCode::kIncomplete : ErrorCode::kUnsupported,
              fitting.empty() ? "No layer's file holds a parameter as the optimizer's files name "
                                "it; the model file has no param_shapes that would tell its shape."
                              : "A tied module's tensor has several shapes in the layers' files.",
              quote(name), "a tensor of " + std::to_string(count) + " elements in its layer's file",
              fitting.empty() ? "none" : to_string(fitting[0]) + " and " + to_string(fitting[1]),
              "bring the layer's file from the node that wrote it");
}

}  // namespace

LayerShapes read_layer_shapes(const ShardedState& state, const std::vector<int>& files) {
  LayerShapes layers;
  for (int file : files) {
    const Fields f(state.document(file));
    std::map<std::string, Shape>& layer = layers[layer_of_file(state, file)];
    for (const auto& [name, node] : f.named(f.root(), "layer"))
      layer.emplace(name, f.tensor(node, name).shape);
  }
  return layers;
}

std::vector<NamedShapes> shapes_of_slices(const ShardedState& part, const LayerShapes& layers) {
  const Fields f(part.document(part.optim_files.at(0)));
  const NodeId optimizer = f.need(f.root(), "optimizer_state_dict");
  const size_t groups =
      f.list(f.need(optimizer, "param_slice_mappings"), "param_slice_mappings").size();
  std::vector<NamedShapes> result;
  for (size_t group = 0; group < groups; ++group) {
    result.emplace_back();
    for (const auto& [name, count] : slices_of(part, group))
      result.back().emplace_back(name, shape_of(part, layers, name, count));
  }
  return result;
}

void add_model_optimizer(ShardedState* part, const ModelStates& model) {
  const Fields own(part->document(model.file)), first(part->document(part->optim_files.at(0)));
  const NodeId copy = own.maybe(own.root(), "optimizer");
  if (copy == kNoNode) return;
  const NodeId original = first.need(first.root(), "optimizer_state_dict");
  const auto add = [&](const std::string& what, NodeId expected, NodeId found) {
    const TensorView a = first.flat_tensor(expected, what), b = own.flat_tensor(found, what);
    if (a.shape != b.shape || a.dtype != b.dtype)
      own.fail("The model file's optimizer is not that of partition rank 0.", "optimizer " + what,
               to_string(a.shape) + " " + name(a.dtype), to_string(b.shape) + " " + name(b.dtype));
    const int one = part->add_leaf(
        file_leaf(first.document(), part->optim_files[0], a, "(partition of rank 0)", what));
    part->replicas.emplace_back(
        one, part->add_leaf(
                 file_leaf(own.document(), model.file, b, "(partition of rank 0)", "model file")));
  };
  const auto states = [](const Fields& f, NodeId optimizer, size_t group) {
    const NodeId base = f.need(optimizer, "base_optimizer_state");
    return find_index(f.pickle(), f.need(base, "state"), static_cast<int64_t>(group));
  };
  const char* kMasters = "single_partition_of_fp32_groups";
  const std::vector<NodeId>& expected = first.list(first.need(original, kMasters), kMasters);
  const std::vector<NodeId>& found = own.list(own.need(copy, kMasters), kMasters);
  if (expected.size() != found.size())
    own.fail("The model file's optimizer is not that of partition rank 0.", kMasters,
             std::to_string(expected.size()), std::to_string(found.size()));
  for (size_t group = 0; group < expected.size(); ++group) {
    add(kMasters, expected[group], found[group]);
    const NodeId a = states(first, original, group), b = states(own, copy, group);
    if (a == kNoNode && b == kNoNode) continue;
    const auto names = [](const Fields& f, NodeId node) {
      return node == kNoNode ? OptimizerState{} : sort_optimizer_state(f, node, "state");
    };
    const OptimizerState theirs = names(first, a), ours = names(own, b);
    if (theirs.tensors.size() != ours.tensors.size())
      own.fail("The model file's optimizer is not that of partition rank 0.", "state",
               std::to_string(theirs.tensors.size()) + " tensors",
               std::to_string(ours.tensors.size()));
    for (const auto& [state, view] : theirs.tensors)
      add(state, first.need(a, state), own.need(b, state));
  }
}

}  // namespace isoshard::checkpoint
