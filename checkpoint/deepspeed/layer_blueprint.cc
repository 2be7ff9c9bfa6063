// Layer files of a target: one a layer and tensor-parallel rank (deepspeed/runtime/pipe/module.py).
#include <algorithm>
#include <map>

#include "checkpoint/deepspeed/pipeline.h"
#include "checkpoint/deepspeed/reshard_target.h"

namespace isoshard::checkpoint {
namespace {

class LayerWriter {
 public:
  explicit LayerWriter(ReshardTarget* target) : target_(*target), state_(target->state) {
    for (const BufferState& buffer : state_.buffers) buffers_.emplace(buffer.name, buffer.leaf);
  }

  std::vector<FileBlueprint> run() {
    std::vector<FileBlueprint> files;
    if (same_ranks()) {
      for (int file : state_.pipeline.layer_files) {
        const SourceFile& layer = state_.files[static_cast<size_t>(file)];
        files.push_back(whole_copy(layer.relative, file, layer.bytes().size_bytes()));
      }
      return files;
    }
    std::map<int, int> templates;  // by layer: the first tensor-parallel rank's file
    for (int file : state_.pipeline.layer_files)
      templates.emplace(layer_of_file(state_, file), file);
    for (int rank = 0; rank < target_.topology.tensor; ++rank) {
      for (const auto& [layer, file] : templates) files.push_back(layer_file(layer, file, rank));
    }
    return files;
  }

 private:
  bool same_ranks() const {
    if (state_.topology.tensor != target_.topology.tensor) return false;
    for (size_t i = 0; i < target_.maps.size(); ++i) {
      if (target_.maps[i] != state_.split_of(state_.parameters[i]).map) return false;
    }
    return true;
  }

  // The source's dictionary with this rank's part of each tensor.
  FileBlueprint layer_file(int layer, int file, int rank) {
    TorchBuilder builder;
    const TorchFile& document = state_.document(file);
    const Pickle& pickle = document.pickle();
    const auto tensors = state_.pipeline.tensors.find(layer);  // none: an empty layer
    for (size_t i = 0; tensors != state_.pipeline.tensors.end() && i < tensors->second.size();
         ++i) {
      const auto& [local, name] = tensors->second[i];
      builder.replace(file, pickle.find(pickle.root, local), tensor(&builder, name, rank));
    }
    const NodeId root = builder.copy(document, file, pickle.root);
    // A run with model-parallel ranks names them in the file even where there is one.
    const std::string& source = state_.files[static_cast<size_t>(file)].relative;
    const bool named = source.find("-model_00-") != std::string::npos;
    const int ranks = target_.topology.tensor;
    return builder.finish(layer_file_name(layer, rank, named ? std::max(ranks, 2) : ranks), root);
  }

  NodeId tensor(TorchBuilder* builder, const std::string& name, int rank) {
    StorageFill fill{.dtype = DType::kFloat32, .numel = 0, .runs = {}, .copy = {}, .literal = {}};
    Shape shape;
    if (const auto buffer = buffers_.find(name); buffer != buffers_.end()) {
      const Leaf& leaf = state_.leaf(buffer->second);
      shape = leaf.shape;
      fill = whole_fill(buffer->second, leaf.size_elements(), leaf.dtype);
    } else {
      const ParameterState* parameter = state_.find_parameter(name);
      const int number = static_cast<int>(parameter - state_.parameters.data());
      shape = target_.shard_shape(number, rank);
      fill.dtype = parameter->model_dtype;
      fill.numel = numel(shape);
      target_.add_runs(&fill, number, rank, {target_.model_leaf(*parameter), 0, fill.numel, 0});
    }
    return builder->tensor({.shape = shape, .storage = builder->add_storage(std::move(fill))});
  }

  ReshardTarget& target_;
  const ShardedState& state_;
  std::map<std::string, int> buffers_;  // leaves by name
};

}  // namespace

std::vector<FileBlueprint> layer_blueprints(ReshardTarget* target) {
  if (!target->state.pipeline.present()) return {};
  return LayerWriter(target).run();
}

}  // namespace isoshard::checkpoint
