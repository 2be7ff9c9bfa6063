// The whole fp32 weights of a checkpoint, as a training script asks for them
// (deepspeed/utils/zero_to_fp32.py, get_fp32_state_dict_from_zero_checkpoint): every parameter from
// its master, what the optimizer does not own and buffers from the model's own copies, and second
// names of tied parameters.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "checkpoint/sharded_state.h"
#include "core/storage.h"

namespace isoshard::engine {

// One tensor: shape and dtype are known at once.
class Fp32Tensor {
 public:
  const std::string& name() const { return name_; }
  const Shape& shape() const { return shape_; }
  DType dtype() const { return dtype_; }  // float32; of an integer buffer its own

  // The values, row-major; integer buffers as float32. Reads the bytes if they were not read yet,
  // without keeping them. Throws what Storage throws; no CRC is compared (isoshard verify does).
  std::vector<float> contiguous() const;

 private:
  friend class Fp32Reader;
  std::string name_;
  Shape shape_;
  DType dtype_ = DType::kFloat32;
  int leaf_ = -1;
  std::shared_ptr<const checkpoint::ShardedState> state_;
  std::shared_ptr<const std::vector<float>> values_;  // of lazy_mode = false
};

struct Fp32Options {
  std::string tag;  // empty: what `latest` says
  bool exclude_frozen_parameters = false;
  bool lazy_mode = false;  // nothing but pickles is read until contiguous() is called
};

// `folder`: a save_dir or a tag folder. Throws what reading throws, such as Error(kNotFound) where
// there is no tag. The storage outlives the tensors.
std::vector<Fp32Tensor> get_fp32_state_dict_from_zero_checkpoint(Storage& storage,
                                                                 const std::string& folder,
                                                                 const Fp32Options& options);

}  // namespace isoshard::engine
