// universal_checkpoint_info of a made-up job (deepspeed/module_inject/layers.py, 0.19.8), from the
// reference's own derivation of who holds what.
#pragma once

#include "checkpoint/torch_builder.h"
#include "properties/model.h"

namespace isoshard::properties {

class SplitInfo {
 public:
  // `model` is whole, or any rank's shard of it.
  SplitInfo(checkpoint::TorchBuilder* builder, const Model& model, int ranks)
      : builder_(*builder), model_(model), ranks_(ranks) {}

  checkpoint::NodeId run();

 private:
  checkpoint::NodeId integers(const std::vector<int64_t>& values, bool tuple = false);
  checkpoint::NodeId map_of(size_t number);
  checkpoint::NodeId pieces_of(size_t number, int rank);
  std::vector<std::vector<int64_t>> widths_of(size_t number) const;
  const Shape& shape_of(size_t number) const;

  checkpoint::TorchBuilder& builder_;
  const Model& model_;
  int ranks_;
};

}  // namespace isoshard::properties
