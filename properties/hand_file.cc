// See hand_file.h.
#include "properties/hand_file.h"

#include "reshard/executor.h"

namespace isoshard::properties {

using checkpoint::NodeId;

int HandFile::literal(const std::string& bytes, DType dtype) {
  const int64_t count = static_cast<int64_t>(bytes.size()) / item_size_bytes(dtype);
  return builder_.add_storage(
      {.dtype = dtype, .numel = count, .runs = {}, .copy = {}, .literal = bytes});
}

NodeId HandFile::whole(const std::string& bytes, DType dtype, const Shape& shape) {
  return builder_.tensor({.shape = shape, .storage = literal(bytes, dtype)});
}

NodeId HandFile::scalar(const ScalarKind& kind, int group) {
  const float value = static_cast<float>(kind.value + group);
  switch (kind.form) {
    case ScalarKind::Form::kInt:
      return pickle().integer(kind.value + group);
    case ScalarKind::Form::kFloat:
      return pickle().real(value);
    case ScalarKind::Form::kNone:
      return pickle().none();
    case ScalarKind::Form::kTensor:
      break;
  }
  return whole(std::string(reinterpret_cast<const char*>(&value), 4), DType::kFloat32, {});
}

void write_folder(Storage& storage, const std::string& folder,
                  std::vector<checkpoint::FileBlueprint> files) {
  storage.make_directories(folder);
  const checkpoint::ShardedState nothing;
  const reshard::ReshardPlan plan = reshard::make_plan(nothing, std::move(files));
  reshard::execute(storage, nothing, plan, folder, {.workers = 1});
}

}  // namespace isoshard::properties
