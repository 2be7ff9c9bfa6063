// The state of a run as whole tensors, put together from what every rank holds: what topologies are
// compared by. Each element must be held, and whoever holds it must hold the same bits.
#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "core/topology.h"
#include "core/training_state.h"

namespace isoshard::reference {

// By (parameter, state): "fp32" for the master, "param" for the copy in the parameters' dtype, and
// the optimizer's states by their own names.
using WholeState = std::map<std::pair<std::string, std::string>, std::vector<float>>;

// Row-major number in the whole tensor of element `at` of a rank's shard.
int64_t whole_element(const TrainedParameter& parameter, int64_t at);

// Throws CheckFailure that names the element where ranks disagree or none has it.
WholeState whole_state(const std::vector<const TrainingState*>& ranks);

// The same of ranks' states that stand in a row.
WholeState whole_state_of(const std::vector<TrainingState>& ranks);

// "" if the bits are the same; otherwise the first difference, in words.
std::string difference(const WholeState& a, const WholeState& b);

}  // namespace isoshard::reference
