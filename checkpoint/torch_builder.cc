// Forms of tensors as torch/_tensor.py's __reduce_ex__ gives them.
#include "checkpoint/torch_builder.h"

#include "checkpoint/format/pickle_writer.h"
#include "core/check.h"

namespace isoshard::checkpoint {

int TorchBuilder::add_storage(StorageFill fill) {
  type_names_.push_back(storage_type_name(fill.dtype));
  CHECK(type_names_.back() != "UntypedStorage", "a dtype without a storage class");
  storages_.push_back(std::move(fill));
  return static_cast<int>(storages_.size()) - 1;
}

NodeId TorchBuilder::storage_node(int number) {
  const StorageFill& fill = storage(number);
  const std::string& type = type_names_[static_cast<size_t>(number)];
  const bool untyped = type == "UntypedStorage";
  return pickle.persistent(pickle.tuple(
      {pickle.string("storage"), pickle.global(untyped ? "torch.storage" : "torch", type),
       pickle.string(std::to_string(number)), pickle.string("cpu"), pickle.integer(fill.numel)}));
}

std::vector<NodeId> TorchBuilder::tensor_args(const TensorSpec& spec) {
  std::vector<NodeId> shape, stride;
  for (int64_t size : spec.shape) shape.push_back(pickle.integer(size));
  for (int64_t step : spec.stride.empty() ? contiguous_stride(spec.shape) : spec.stride)
    stride.push_back(pickle.integer(step));
  return {storage_node(spec.storage),         pickle.integer(spec.offset),
          pickle.tuple(std::move(shape)),     pickle.tuple(std::move(stride)),
          pickle.boolean(spec.requires_grad), pickle.ordered_dict({})};
}

NodeId TorchBuilder::tensor(const TensorSpec& spec) {
  return pickle.reduce("torch._utils", "_rebuild_tensor_v2", tensor_args(spec));
}

NodeId TorchBuilder::tensor_with_attribute(const TensorSpec& spec, const std::string& name,
                                           const std::string& text) {
  return pickle.reduce(
      "torch._tensor", "_rebuild_from_type_v2",
      {pickle.global("torch._utils", "_rebuild_tensor_v2"), pickle.global("torch", "Tensor"),
       pickle.tuple(tensor_args(spec)), dict({{name, pickle.string(text)}})});
}

NodeId TorchBuilder::copy(const TorchFile& source, int source_file, NodeId node) {
  const auto replace = [&](NodeId child) -> NodeId {
    if (source.pickle().kind(child) != Kind::kPersistent) return kNoNode;
    const int number = source.storage_number(child);
    const auto [found, fresh] = copied_storages_.emplace(std::pair(source_file, number), 0);
    if (fresh) {
      const StorageEntry& entry = source.storages()[static_cast<size_t>(number)];
      const ZipRecord& record = source.record(number);
      type_names_.push_back(entry.type_name);
      storages_.push_back(
          StorageFill{.dtype = entry.dtype,
                      .numel = entry.numel,
                      .runs = {},
                      .copy = SourceBytes{source_file, record.data_offset, record.size_bytes},
                      .literal = {}});
      found->second = static_cast<int>(storages_.size()) - 1;
    }
    return storage_node(found->second);
  };
  return pickle.copy_from(source.pickle(), node, copied_nodes_[source_file], replace);
}

NodeId TorchBuilder::copy_scalar(const TorchFile& source, int source_file, NodeId node) {
  const std::optional<TensorView> view = source.tensor(node);
  if (!view) return copy(source, source_file, node);
  const int64_t bytes = numel(view->shape) * item_size_bytes(view->dtype);
  StorageFill fill{
      .dtype = view->dtype, .numel = numel(view->shape), .runs = {}, .copy = {}, .literal = {}};
  fill.copy = SourceBytes{source_file, source.data_offset(*view), bytes};
  const int storage = add_storage(std::move(fill));
  return tensor({.shape = view->shape, .storage = storage, .requires_grad = view->requires_grad});
}

NodeId TorchBuilder::dict(std::vector<std::pair<std::string, NodeId>> entries) {
  std::vector<NodeId> items;
  for (const auto& [key, value] : entries) {
    items.push_back(pickle.string(key));
    items.push_back(value);
  }
  return pickle.dict(std::move(items));
}

NodeId TorchBuilder::tuple_node(const Shape& shape) {
  std::vector<NodeId> sizes;
  for (int64_t size : shape) sizes.push_back(pickle.integer(size));
  return pickle.tuple(std::move(sizes));
}

NodeId TorchBuilder::size_node(const Shape& shape) {
  return pickle.reduce("torch", "Size", {tuple_node(shape)});
}

FileBlueprint TorchBuilder::finish(const std::string& path, NodeId root) {
  pickle.root = root;
  return FileBlueprint{.path = path,
                       .kind = FileBlueprint::Kind::kTorch,
                       .head = write_pickle(pickle),
                       .storages = std::move(storages_)};
}

}  // namespace isoshard::checkpoint
