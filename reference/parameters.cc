// See parameters.h.
#include "reference/parameters.h"

#include <algorithm>

#include "core/cast.h"
#include "core/check.h"
#include "core/numbers.h"

namespace isoshard::reference {
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

Values Parameters::gather(Communicator& group, const Values& own) const {
  if (group.size() == 1) return own;
  const DType dtype = state_->dtype;
  const size_t count = own.size(), members = static_cast<size_t>(group.size());
  const size_t bytes = count * static_cast<size_t>(item_size_bytes(dtype));
  std::vector<std::byte> sent(bytes), received(bytes * members);
  cast(DType::kFloat32, std::as_bytes(std::span(own)), dtype, sent);
  std::vector<Buffer> buffers;
  for (size_t p = 0; p < members; ++p) {
    buffers.push_back({dtype, received.data() + p * bytes, static_cast<int64_t>(count)});
  }
  group.all_gather({dtype, sent.data(), static_cast<int64_t>(count)}, buffers);
  Values all(count * members);
  cast(dtype, received, DType::kFloat32, std::as_writable_bytes(std::span(all)));
  return all;
}

const Values& Parameters::use(int number) {
  const LocalParameter& local = list_[static_cast<size_t>(number)];
  CHECK(local.state >= 0, "a parameter of another pipeline stage is used");
  const TrainedParameter& parameter = state_->parameters[static_cast<size_t>(local.state)];
  if (state_->stage < 3) return parameter.values;
  Values& values = gathered_[static_cast<size_t>(number)];
  const int64_t count = numel(local.shape);
  if (!values.empty() || count == 0) return values;
  Communicator& owners = this->owners(parameter.expert);
  const int64_t slot = div_ceil(count, owners.size());
  Values own(static_cast<size_t>(slot), 0.0f);
  if (parameter.frozen()) {
    std::copy(parameter.values.begin(), parameter.values.end(), own.begin());
  } else {
    const TrainedGroup& group = state_->groups[static_cast<size_t>(parameter.group)];
    for (const BufferPiece& piece : group.pieces) {
      if (piece.parameter != local.state) continue;
      for (int64_t i = 0; i < piece.count; ++i) {
        own[static_cast<size_t>(i)] =
            rounded_to(state_->dtype, group.master[static_cast<size_t>(piece.at + i)]);
      }
    }
  }
  values = gather(owners, own);
  values.resize(static_cast<size_t>(count));
  return values;
}

void Parameters::release(int number) {
  gathered_[static_cast<size_t>(number)].clear();
  gathered_[static_cast<size_t>(number)].shrink_to_fit();
}

}  // namespace isoshard::reference
