// One rank's parameters as the model uses them: there, or gathered for the moment (ZeRO stage 3).
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/parallel_state.h"
#include "core/training_state.h"
#include "reference/contraction.h"
#include "reference/model.h"

namespace isoshard::reference {

// What a rank knows of each parameter of the model; those of other pipeline stages are not held.
struct LocalParameter {
  ParameterInfo info;
  int state = -1;           // number in TrainingState::parameters; −1: not held
  Span shard;               // of the split axis
  Shape shape;              // of the shard
  std::vector<Span> spans;  // of all tensor-parallel ranks, on the split axis
};

class Parameters {
 public:
  Parameters(const ModelConfig& config, const ParallelState& parallel, TrainingState* state);

  int count() const { return static_cast<int>(list_.size()); }
  const LocalParameter& local(int number) const { return list_[static_cast<size_t>(number)]; }
  int find(const std::string& name) const;  // CheckFailure if there is none

  // The values of the shard. At stage 3 an all_gather over the ranks that share it; release() drops
  // them again.
  const Values& use(int number);
  void release(int number);

  // The communicator over which a parameter's optimizer state is shared.
  Communicator& owners(bool expert) const {
    return expert ? *parallel_.expert_data : *parallel_.zero;
  }
  // What all owners have, by rank, as much as this one: on the wire in the parameters' dtype.
  Values gather(Communicator& group, const Values& own) const;

 private:
  const ParallelState& parallel_;
  TrainingState* state_;
  std::vector<LocalParameter> list_;
  std::unordered_map<std::string, int> numbers_;
  std::vector<Values> gathered_;
};

}  // namespace isoshard::reference
