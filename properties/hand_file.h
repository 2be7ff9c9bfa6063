// What hand-made checkpoint files of all kinds are written with: tensors, numbers, and the folder.
#pragma once

#include <string>
#include <vector>

#include "checkpoint/torch_builder.h"
#include "core/storage.h"
#include "properties/model.h"

namespace isoshard::properties {

class HandFile {
 protected:
  checkpoint::Pickle& pickle() { return builder_.pickle; }
  // A storage of these bytes; its number.
  int literal(const std::string& bytes, DType dtype);
  // A tensor that is the whole of such a storage.
  checkpoint::NodeId whole(const std::string& bytes, DType dtype, const Shape& shape);
  // The number that the optimizer keeps for a parameter of that group.
  checkpoint::NodeId scalar(const ScalarKind& kind, int group);

  checkpoint::TorchBuilder builder_;
};

// Writes the files into `folder`, which is made.
void write_folder(Storage& storage, const std::string& folder,
                  std::vector<checkpoint::FileBlueprint> files);

}  // namespace isoshard::properties
