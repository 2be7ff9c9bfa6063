// Laws of sums and groups. See training_laws.h.
#include <bit>
#include <map>
#include <optional>
#include <set>

#include "core/canonical_sum.h"
#include "core/exact_sum.h"
#include "core/hex_float.h"
#include "core/process_group.h"
#include "core/random.h"
#include "properties/training_laws.h"

namespace isoshard::properties {
namespace {

using Leaves = std::map<LeafIndex, float>;

std::optional<float> node(const Leaves& leaves, int level, LeafIndex index) {
  if (level == 0) {
    const auto found = leaves.find(index);
    return found == leaves.end() ? std::nullopt : std::optional(found->second);
  }
  const std::optional<float> a = node(leaves, level - 1, 2 * index);
  const std::optional<float> b = node(leaves, level - 1, 2 * index + 1);
  return a && b ? *a + *b : (a ? a : b);
}

float drawn_value(uint64_t word) {
  switch (word % 8) {
    case 0:
      return -0.0f;
    case 1:
      return 0.0f;
    case 2:
      return std::bit_cast<float>(static_cast<uint32_t>(word >> 41));  // small, subnormal too
    default:
      return static_cast<float>(static_cast<int64_t>(word >> 30) - (int64_t{1} << 33)) * 0x1p-20f;
  }
}

}  // namespace

// Any owners of any leaves, intervals or scattered, some leaves absent: one bit pattern.
std::string sums_do_not_know_owners(const Draw& draw, TrainingMutant mutant) {
  const int64_t count = draw(1, 64), owners = draw(1, 9);
  const uint64_t seed = static_cast<uint64_t>(draw(0, 1'000'000'000));
  const bool strided = draw(0, 1) == 1, zeros = draw(0, 3) == 1;
  std::vector<std::vector<LeafRange>> owned(static_cast<size_t>(owners));
  Leaves leaves;
  int64_t owner = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t word = keyed_random(seed, {static_cast<uint64_t>(i)});
    if (strided)
      owner = static_cast<int64_t>((word >> 8) % static_cast<uint64_t>(owners));
    else if (owner + 1 < owners && word % 5 == 0)
      ++owner;
    const LeafIndex leaf = static_cast<LeafIndex>(i);
    owned[static_cast<size_t>(owner)].push_back({leaf, leaf + 1});
    if ((word >> 20) % 4 != 0) leaves[leaf] = zeros ? -0.0f : drawn_value(mix(word));
  }
  std::vector<Partial> partials;
  for (const std::vector<LeafRange>& ranges : owned) {
    PartialSum sum(frontier(ranges), 1);
    for (const LeafRange& range : ranges) {
      const auto found = leaves.find(range.begin);
      if (found != leaves.end())
        *sum.push_leaf(range.begin) = found->second;
      else if (mutant == TrainingMutant::kAbsentIsZero)
        *sum.push_leaf(range.begin) = 0.0f;
    }
    partials.push_back(sum.finish());
  }
  float root = 0;
  if (mutant == TrainingMutant::kRankOrderSum) {
    bool first = true;
    for (const Partial& partial : partials) {
      PartialCombiner one(1);
      one.add(partial);
      float part = 0;
      if (!one.finish({&part, 1})) continue;
      root = first ? part : root + part;
      first = false;
    }
  } else {
    PartialCombiner combiner(1);
    for (size_t k = partials.size(); k-- > 0;) combiner.add(partials[k]);  // any order
    combiner.finish({&root, 1});
  }
  const float expected = node(leaves, 7, 0).value_or(0.0f);
  if (std::bit_cast<uint32_t>(root) == std::bit_cast<uint32_t>(expected)) return "";
  return std::to_string(count) + " leaves of " + std::to_string(owners) +
         " owners: " + hex_float(root) + ", by the definition " + hex_float(expected);
}

// Groups of every kind cover the ranks, each rank in the one that it names, and the expert and
// dense meshes number the same ranks.
std::string groups_are_bijections(const Draw& draw, TrainingMutant mutant) {
  Topology t;
  t.pipeline = static_cast<int>(draw(1, 3));
  t.data = static_cast<int>(draw(1, 5));
  t.sequence = static_cast<int>(draw(1, 4));
  t.tensor = static_cast<int>(draw(1, 3));
  const int stage = t.world() / t.pipeline;
  do {
    t.expert = static_cast<int>(draw(1, stage));
  } while (stage % t.expert != 0 && (t.expert = 1) != 1);
  const std::map<GroupKind, int> sizes = {{GroupKind::kWorld, t.world()},
                                          {GroupKind::kData, t.data},
                                          {GroupKind::kSequence, t.sequence},
                                          {GroupKind::kTensor, t.tensor},
                                          {GroupKind::kPipeline, t.pipeline},
                                          {GroupKind::kZero, t.zero_ranks()},
                                          {GroupKind::kExpert, t.expert},
                                          {GroupKind::kExpertData, stage / t.expert},
                                          {GroupKind::kModel, t.tensor * t.pipeline},
                                          {GroupKind::kStage, stage}};
  for (const auto& [kind, size] : sizes) {
    std::set<std::vector<int>> groups;
    for (int rank = 0; rank < t.world(); ++rank) {
      std::vector<int> group = group_of(t, kind, rank);
      if (mutant == TrainingMutant::kForgottenRank && group.size() > 1) group.pop_back();
      if (!std::is_sorted(group.begin(), group.end())) return "a group is not sorted";
      if (std::find(group.begin(), group.end(), rank) == group.end()) {
        return std::string("rank ") + std::to_string(rank) + " is not in its group " + name(kind);
      }
      groups.insert(group);
    }
    size_t members = 0;
    for (const std::vector<int>& group : groups) members += group.size();
    if (members != static_cast<size_t>(t.world())) {
      return std::string("groups ") + name(kind) + " overlap or leave ranks out";
    }
    if (groups.size() * static_cast<size_t>(size) != members) {
      return std::string("groups ") + name(kind) + " have another size";
    }
  }
  return "";
}

}  // namespace isoshard::properties
