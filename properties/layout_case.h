// States of given values, without training: saved by every rank of one topology, resharded and
// loaded by every rank of another, all through DeepSpeed's files. Each value is a word of its
// coordinates (parameter, state, element of the whole tensor), so that wherever it comes to lie it
// can be told without a second way through the program.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "properties/simulation_case.h"

namespace isoshard::properties {

struct LayoutCase {
  reference::TrainConfig config;
  std::vector<std::string> states;  // names of the optimizer's states, whatever its kind
  uint64_t seed = 1;                // of the values and of the schedulers
  Leg from, to;                     // their steps count for nothing
};

// The ZeRO stages at which a run of this topology has DeepSpeed's files.
std::vector<int> stages_with_files(const reference::TrainConfig& config, const Topology& topology);

// A model, a schema of states, and both ends. Topologies of few ranks are as likely as those of
// many: the power of two below the number of ranks is drawn first, then one of those that the model
// and DeepSpeed's files can have; where there is none, dp alone. To a single topology in `from` the
// model gives way.
LayoutCase draw_layout_case(const Draw& draw, const std::vector<Topology>& from,
                            const std::vector<Topology>& to);
LayoutCase seeded_layout_case(uint64_t seed, uint64_t number,
                              const std::vector<Topology>& topologies);

std::string text_of(const LayoutCase& value);

// What a wrong resharder does to the files on the way.
enum class LayoutMutant {
  kNone,
  kSwappedRanks,   // two ranks' optimizer files, which differ, have each other's name
  kStaleFile,      // the first rank's optimizer file stands for the last rank's too
  kSwappedLayers,  // two layers of a PipelineModule have each other's file
};
std::string name(LayoutMutant mutant);

// "" if every rank of `to` holds the values of its coordinates and the counters, and, where it
// loads the weights alone, the values rounded to its dtype; otherwise the first that it does not
// hold. Throws what the program throws. Not verified: loss scale, settings, client state.
std::string layout_difference(const LayoutCase& value, LayoutMutant mutant = LayoutMutant::kNone);

}  // namespace isoshard::properties
