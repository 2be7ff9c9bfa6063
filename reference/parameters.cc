// See parameters.h.
#include "reference/parameters.h"

#include <algorithm>
#include <cstring>

#include "core/cast.h"
#include "core/check.h"
#include "reference/zero.h"

namespace isoshard::reference {
namespace {

std::vector<uint16_t> narrowed(const Values& values, DType dtype) {
  std::vector<uint16_t> bits;
  for (const float value : values) {
    bits.push_back(dtype == DType::kBFloat16 ? bfloat16_from_float(value) : half_from_float(value));
  }
  return bits;
}

}  // namespace

Parameters::Parameters(const ModelConfig& config, const ParallelState& parallel,
                       TrainingState* state)
    : parallel_(parallel), state_(state) {
  const Topology& t = parallel.topology;
  for (const ParameterInfo& info : parameters_of(config)) {
    LocalParameter local{.info = info};
    local.shard = shard_of(config, info, t, parallel.at.tensor, parallel.at.expert);
    local.shape = shard_shape(info, local.shard);
    if (info.split == Split::kColumn || info.split == Split::kRow) {
      for (int rank = 0; rank < t.tensor; ++rank) {
        local.spans.push_back(shard_of(config, info, t, rank, parallel.at.expert));
      }
    }
    for (size_t i = 0; i < state->parameters.size(); ++i) {
      if (state->parameters[i].name == info.name) local.state = static_cast<int>(i);
    }
    numbers_[info.name] = static_cast<int>(list_.size());
    list_.push_back(std::move(local));
  }
  gathered_.resize(list_.size());
}

int Parameters::find(const std::string& name) const {
  const auto found = numbers_.find(name);
  CHECK(found != numbers_.end(), "no parameter " + name);
  return found->second;
}

void Parameters::gather(Communicator& group, const Values& own, std::vector<Values>* target) const {
  if (group.size() == 1) {
    (*target)[0] = own;
    return;
  }
  if (state_->dtype == DType::kFloat32) {
    std::vector<Buffer> buffers;
    for (Values& values : *target) buffers.push_back(buffer(std::span(values)));
    group.all_gather(const_buffer(std::span<const float>(own)), buffers);
    return;
  }
  const std::vector<uint16_t> sent = narrowed(own, state_->dtype);
  std::vector<std::vector<uint16_t>> received;
  for (const Values& values : *target) received.emplace_back(values.size());
  std::vector<Buffer> buffers;
  for (std::vector<uint16_t>& bits : received) {
    Buffer bytes = buffer(std::span(bits));
    bytes.dtype = state_->dtype;
    buffers.push_back(bytes);
  }
  ConstBuffer source = const_buffer(std::span<const uint16_t>(sent));
  source.dtype = state_->dtype;
  group.all_gather(source, buffers);
  for (size_t p = 0; p < received.size(); ++p) {
    for (size_t i = 0; i < received[p].size(); ++i) {
      (*target)[p][i] = state_->dtype == DType::kBFloat16 ? float_from_bfloat16(received[p][i])
                                                          : float_from_half(received[p][i]);
    }
  }
}

const Values& Parameters::use(int number) {
  const LocalParameter& local = list_[static_cast<size_t>(number)];
  CHECK(local.state >= 0, "a parameter of another pipeline stage is used");
  const TrainedParameter& parameter = state_->parameters[static_cast<size_t>(local.state)];
  if (state_->stage < 3) return parameter.values;
  Values& values = gathered_[static_cast<size_t>(number)];
  const int64_t count = numel(local.shape);
  if (!values.empty() || count == 0) return values;
  const TrainedGroup& group = state_->groups[static_cast<size_t>(parameter.group)];
  Communicator& owners = this->owners(parameter.expert);
  const int64_t slot = (count + owners.size() - 1) / owners.size();
  Values own(static_cast<size_t>(slot), 0.0f);
  for (const BufferPiece& piece : group.pieces) {
    if (piece.parameter != local.state) continue;
    for (int64_t i = 0; i < piece.count; ++i) {
      own[static_cast<size_t>(i)] =
          rounded(group.master[static_cast<size_t>(piece.at + i)], state_->dtype);
    }
  }
  std::vector<Values> slots(static_cast<size_t>(owners.size()), Values(own.size()));
  gather(owners, own, &slots);
  for (const Values& part : slots) values.insert(values.end(), part.begin(), part.end());
  values.resize(static_cast<size_t>(count));
  return values;
}

void Parameters::release(int number) {
  gathered_[static_cast<size_t>(number)].clear();
  gathered_[static_cast<size_t>(number)].shrink_to_fit();
}

}  // namespace isoshard::reference
