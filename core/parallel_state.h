// Where a rank stands, and its communicators. Passed in, never global.
#pragma once

#include "core/communicator.h"
#include "core/process_group.h"
#include "core/topology.h"

namespace isoshard {

struct ParallelState {
  Topology topology;
  int rank = 0;
  Coordinate at;
  // Never null; of one member where the axis has degree 1.
  Communicator* world = nullptr;
  Communicator* zero = nullptr;  // dp·sp
  Communicator* sequence = nullptr;
  Communicator* tensor = nullptr;
  Communicator* pipeline = nullptr;
  Communicator* expert = nullptr;
  Communicator* expert_data = nullptr;

  bool first_stage() const { return at.pipeline == 0; }
  bool last_stage() const { return at.pipeline == topology.pipeline - 1; }
};

}  // namespace isoshard
