// A simulated rank as the reference wants to see it.
#pragma once

#include "core/parallel_state.h"
#include "sim/cluster.h"

namespace isoshard::tests {

inline ParallelState parallel_state(sim::Rank& rank) {
  return {.topology = rank.topology(),
          .rank = rank.number(),
          .at = coordinate_of(rank.topology(), rank.number()),
          .world = &rank.group(GroupKind::kWorld),
          .zero = &rank.group(GroupKind::kZero),
          .sequence = &rank.group(GroupKind::kSequence),
          .tensor = &rank.group(GroupKind::kTensor),
          .pipeline = &rank.group(GroupKind::kPipeline),
          .expert = &rank.group(GroupKind::kExpert),
          .expert_data = &rank.group(GroupKind::kExpertData)};
}

}  // namespace isoshard::tests
