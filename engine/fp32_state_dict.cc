// See fp32_state_dict.h.
#include "engine/fp32_state_dict.h"

#include <algorithm>

#include "checkpoint/deepspeed/reader.h"
#include "core/cast.h"
#include "core/error.h"
#include "reshard/tensor_values.h"

namespace isoshard::engine {

using checkpoint::ShardedState;

std::vector<float> Fp32Tensor::contiguous() const {
  if (values_) return *values_;
  const checkpoint::Leaf& leaf = state_->leaf(leaf_);
  const int64_t count = leaf.size_elements();
  std::vector<std::byte> bytes(static_cast<size_t>(leaf.size_bytes()));
  if (count > 0) reshard::read_elements(*state_, leaf, 0, bytes);
  std::vector<float> values(static_cast<size_t>(count));
  cast(leaf.dtype, bytes, DType::kFloat32, std::as_writable_bytes(std::span(values)));
  return values;
}

class Fp32Reader {
 public:
  Fp32Reader(Storage& storage, const std::string& folder, const Fp32Options& options)
      : options_(options) {
    checkpoint::ReadOptions read{.workers = 1};
    read.tag = options.tag;
    state_ =
        std::make_shared<const ShardedState>(checkpoint::read_checkpoint(storage, folder, read));
  }

  std::vector<Fp32Tensor> run() {
    for (const checkpoint::BufferState& buffer : state_->buffers) add(buffer.name, buffer.leaf);
    for (const bool frozen : {true, false}) {
      for (const checkpoint::ParameterState& parameter : state_->parameters) {
        if ((parameter.group < 0) != frozen) continue;
        if (frozen && options_.exclude_frozen_parameters) continue;
        add(parameter.name, parameter.weight);
      }
    }
    for (const checkpoint::Alias& alias : state_->aliases) {
      const auto target = std::ranges::find(list_, alias.target, &Fp32Tensor::name);
      if (target != list_.end()) add(alias.name, target->leaf_);  // otherwise it is left out too
    }
    return std::move(list_);
  }

 private:
  void add(const std::string& name, int leaf) {
    Fp32Tensor tensor;
    tensor.name_ = name;
    tensor.shape_ = state_->leaf(leaf).shape;
    const DType dtype = state_->leaf(leaf).dtype;
    if (!can_cast(dtype, DType::kFloat32)) {
      throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                            .what = "A tensor has no float32 form.",
                            .file = state_->folder,
                            .entry = quote(name),
                            .expected = "a real dtype",
                            .found = isoshard::name(dtype),
                            .next = "take it from the model file"});
    }
    tensor.dtype_ = is_floating(dtype) ? DType::kFloat32 : dtype;
    tensor.leaf_ = leaf;
    tensor.state_ = state_;
    if (!options_.lazy_mode) {
      tensor.values_ = std::make_shared<const std::vector<float>>(tensor.contiguous());
    }
    list_.push_back(std::move(tensor));
  }

  const Fp32Options& options_;
  std::shared_ptr<const ShardedState> state_;
  std::vector<Fp32Tensor> list_;
};

std::vector<Fp32Tensor> get_fp32_state_dict_from_zero_checkpoint(Storage& storage,
                                                                 const std::string& folder,
                                                                 const Fp32Options& options) {
  return Fp32Reader(storage, folder, options).run();
}

}  // namespace isoshard::engine
