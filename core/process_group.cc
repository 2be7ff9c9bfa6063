// See process_group.h.
#include "core/process_group.h"

#include <algorithm>
#include <array>

#include "core/check.h"
#include "core/error.h"
#include "core/mutant.h"

namespace isoshard {
namespace {

// Degrees and the axes that vary, slowest axis first.
struct Mesh {
  std::array<int, 4> degrees;
  std::array<bool, 4> varies;
};

Mesh mesh_of(const Topology& t, GroupKind kind) {
  const int stage = t.world() / t.pipeline;
  const bool swapped = mutant("tp_dp_swapped");
  const std::array<int, 4> dense = {t.pipeline, swapped ? t.tensor : t.data, t.sequence,
                                    swapped ? t.data : t.tensor};
  const std::array<int, 4> expert = {t.pipeline, stage / t.expert, t.expert, 1};
  switch (kind) {
    case GroupKind::kWorld:
      return {dense, {true, true, true, true}};
    case GroupKind::kData:
      return {dense, {false, true, false, false}};
    case GroupKind::kSequence:
      return {dense, {false, false, true, false}};
    case GroupKind::kTensor:
      return {dense, {false, false, false, true}};
    case GroupKind::kPipeline:
      return {dense, {true, false, false, false}};
    case GroupKind::kZero:
      return {dense, {false, true, !mutant("zero_group_without_sequence"), false}};
    case GroupKind::kExpert:
      if (mutant("expert_axes_exchanged")) return {expert, {false, true, false, false}};
      return {expert, {false, false, true, false}};
    case GroupKind::kExpertData:
      return {expert, {false, true, false, false}};
    case GroupKind::kModel:
      return {dense, {true, false, false, true}};
    case GroupKind::kStage:
      break;
  }
  return {dense, {false, true, true, true}};
}

std::array<int, 4> split(const std::array<int, 4>& degrees, int rank) {
  std::array<int, 4> coordinates{};
  for (size_t axis = 4; axis-- > 0;) {
    coordinates[axis] = rank % degrees[axis];
    rank /= degrees[axis];
  }
  return coordinates;
}

}  // namespace

const char* name(GroupKind kind) {
  constexpr const char* kNames[] = {"world", "dp", "sp",  "tp",    "pp",
                                    "dp.sp", "ep", "edp", "pp.tp", "stage"};
  return kNames[static_cast<size_t>(kind)];
}

Coordinate coordinate_of(const Topology& topology, int rank) {
  CHECK(rank >= 0 && rank < topology.world(), "no such rank");
  const std::array<int, 4> dense = split(mesh_of(topology, GroupKind::kWorld).degrees, rank);
  const std::array<int, 4> expert = split(mesh_of(topology, GroupKind::kExpert).degrees, rank);
  return {.pipeline = dense[0],
          .data = dense[1],
          .sequence = dense[2],
          .tensor = dense[3],
          .expert_data = expert[1],
          .expert = expert[2]};
}

int rank_of(const Topology& topology, const Coordinate& at) {
  return ((at.pipeline * topology.data + at.data) * topology.sequence + at.sequence) *
             topology.tensor +
         (mutant("tensor_rank_dropped") ? 0 : at.tensor);
}

std::vector<int> group_of(const Topology& topology, GroupKind kind, int rank) {
  CHECK(rank >= 0 && rank < topology.world(), "no such rank");
  const Mesh mesh = mesh_of(topology, kind);
  std::array<int, 4> strides{};
  int stride = 1;
  for (size_t axis = 4; axis-- > 0;) {
    strides[axis] = stride;
    stride *= mesh.degrees[axis];
  }
  const std::array<int, 4> own = split(mesh.degrees, rank);
  int first = rank;
  for (size_t axis = 0; axis < 4; ++axis) {
    if (mesh.varies[axis]) first -= own[axis] * strides[axis];
  }
  std::vector<int> ranks = {first};
  for (size_t axis = 0; axis < 4; ++axis) {
    if (!mesh.varies[axis]) continue;
    std::vector<int> longer;
    for (const int base : ranks) {
      for (int k = 0; k < mesh.degrees[axis]; ++k) longer.push_back(base + k * strides[axis]);
    }
    ranks = std::move(longer);
  }
  return ranks;
}

void check_topology(const Topology& topology) {
  for (const Axis axis :
       {Axis::kPipeline, Axis::kData, Axis::kSequence, Axis::kTensor, Axis::kExpert}) {
    if (topology.degree(axis) >= 1) continue;
    throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                          .what = "A degree of the topology is not a positive number "
                                  "(DeepSpeed: ValueError).",
                          .entry = name(axis),
                          .expected = "1 or more",
                          .found = std::to_string(topology.degree(axis))});
  }
  const int stage = topology.world() / topology.pipeline;
  if (stage % topology.expert == 0 || mutant("expert_degree_unchecked")) return;
  std::string divisors;
  for (int k = 1; k <= stage; ++k) {
    if (stage % k == 0) divisors += (divisors.empty() ? "" : ", ") + std::to_string(k);
  }
  throw Error(ErrorInfo{
      .code = ErrorCode::kUsage,
      .what = "The expert-parallel ranks do not divide the ranks of a stage "
              "(DeepSpeed: AssertionError for native MoE, ValueError for AutoEP).",
      .entry = to_string(topology),
      .expected = "ep that divides dp·sp·tp = " + std::to_string(topology.data) + "·" +
                  std::to_string(topology.sequence) + "·" + std::to_string(topology.tensor) +
                  " = " + std::to_string(stage) + ": " + divisors,
      .found = "ep = " + std::to_string(topology.expert) + ", " + std::to_string(stage) + " mod " +
               std::to_string(topology.expert) + " = " + std::to_string(stage % topology.expert),
      .next = "choose another ep, or another number of ranks"});
}

}  // namespace isoshard
