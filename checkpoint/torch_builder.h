// Builds the blueprint of one torch.save file: a pickle, and storages whose contents are runs of
// leaves, copies of source storages, or literals.
#pragma once

#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "checkpoint/blueprint.h"
#include "checkpoint/format/torch_file.h"

namespace isoshard::checkpoint {

class TorchBuilder {
 public:
  Pickle pickle;

  int add_storage(StorageFill fill);
  StorageFill& storage(int number) { return storages_[static_cast<size_t>(number)]; }

  // A contiguous tensor over storage `number`, beginning at element `offset`.
  struct TensorSpec {
    Shape shape;
    int storage = -1;
    int64_t offset = 0;
    bool requires_grad = false;
    Shape stride = {};  // of a tensor without elements; otherwise it is contiguous
  };
  NodeId tensor(const TensorSpec& spec);
  // The same with python attributes: {name: text} pickled as torch does for tensors that carry any.
  NodeId tensor_with_attribute(const TensorSpec& spec, const std::string& name,
                               const std::string& text);

  // A copy of a subgraph of a source file; storages that it uses are copied whole, once.
  NodeId copy(const TorchFile& source, int source_file, NodeId node);

  // From now on copies of `node` of that file are `replacement`.
  void replace(int source_file, NodeId node, NodeId replacement) {
    copied_nodes_[source_file][node] = replacement;
  }

  // A number or 0-d tensor of the source; a tensor gets a storage of its own at every call.
  NodeId copy_scalar(const TorchFile& source, int source_file, NodeId node);

  // {key: value, …} with string keys.
  NodeId dict(std::vector<std::pair<std::string, NodeId>> entries);
  NodeId tuple_node(const Shape& shape);  // (2, 3)
  NodeId size_node(const Shape& shape);   // torch.Size

  FileBlueprint finish(const std::string& path, NodeId root);

 private:
  NodeId storage_node(int number);
  std::vector<NodeId> tensor_args(const TensorSpec& spec);

  std::vector<StorageFill> storages_;
  std::vector<std::string> type_names_;
  std::map<std::pair<int, int>, int> copied_storages_;  // (file, storage) → number
  std::map<int, std::unordered_map<NodeId, NodeId>> copied_nodes_;
};

}  // namespace isoshard::checkpoint
