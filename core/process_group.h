// Which ranks act together. One rule makes every group: a mesh numbers the ranks by their
// coordinates, the last axis fastest, and a group is what is reached by varying some of the axes.
//
//   dense mesh    rank = ((pipeline·dp + data)·sp + sequence)·tp + tensor
//   expert mesh   rank = (pipeline·edp + expert_data)·ep + expert          of the same ranks
//
// The dense mesh is DeepSpeed's for AutoTP (data, tensor), Ulysses (data, sequence) and pipelines
// (pipe, data, model); the expert mesh is its builders A (E+D) and, with tensor-parallel ranks, D
// (deepspeed/utils/groups.py).
#pragma once

#include <string>
#include <vector>

#include "core/topology.h"

namespace isoshard {

enum class GroupKind {
  kWorld,
  kData,        // dp
  kSequence,    // sp: Ulysses' exchanges
  kTensor,      // tp
  kPipeline,    // pp
  kZero,        // dp·sp: who shares the optimizer's state of dense parameters
  kExpert,      // ep: who holds a layer's experts
  kExpertData,  // edp: who shares the optimizer's state of an expert
  kModel,       // pp·tp: the mp ranks
  kStage,       // all ranks of a pipeline stage
};

const char* name(GroupKind kind);  // "world", "dp", "sp", "tp", "pp", "dp.sp", "ep", "edp", …

struct Coordinate {
  int pipeline = 0;
  int data = 0;
  int sequence = 0;
  int tensor = 0;
  int expert_data = 0;
  int expert = 0;
  bool operator==(const Coordinate&) const = default;
};

Coordinate coordinate_of(const Topology& topology, int rank);

// The rank with these dense coordinates; expert and expert_data are not read.
int rank_of(const Topology& topology, const Coordinate& coordinate);

// Ranks of the group that `rank` belongs to, ascending. A rank's number in the group is its
// position in that list.
std::vector<int> group_of(const Topology& topology, GroupKind kind, int rank);

// Throws Error(kUsage) where ep does not divide the ranks of a stage; says the arithmetic and what
// DeepSpeed raises there.
void check_topology(const Topology& topology);

}  // namespace isoshard
