// See topology_plans.h.
#include "properties/topology_plans.h"

#include <algorithm>
#include <map>

#include "reference/whole_state.h"
#include "reshard/plan.h"
#include "sim/topologies/catalog.h"

namespace isoshard::properties {
namespace {

using checkpoint::FileBlueprint;
using checkpoint::FileFragment;
using checkpoint::ShardedState;

// Of every axis as many as 8 ranks can share; heads, rows and experts stay small.
reference::TrainConfig smallest(int experts) {
  reference::TrainConfig config;
  reference::ModelConfig& m = config.model;
  m.vocabulary = 5;
  m.hidden = 2;
  m.heads = m.kv_heads = 2;
  m.layers = 8;
  m.experts = experts;
  m.top_k = 1;
  m.expert_intermediate = 1;
  config.data.batch = 1;
  config.data.sequence_length = 2;
  return config;
}

std::vector<Topology> topologies_of(int world) {
  std::vector<Topology> list = sim::topologies_up_to(world);
  std::erase_if(list, [](const Topology& t) { return t.zero_ranks() % t.expert != 0; });
  return list;
}

// A run of consecutive elements of the whole tensor in a rank's buffer.
struct Run {
  int leaf = 0;
  int64_t begin = 0, count = 0, at = 0;
};

std::vector<Run> runs_of(const TrainingState& state, const std::map<std::string, int>& leaves,
                         int64_t* size) {
  std::vector<Run> runs;
  int64_t base = 0;
  for (const TrainedGroup& group : state.groups) {
    for (const BufferPiece& piece : group.pieces) {
      const TrainedParameter& p = state.parameters[static_cast<size_t>(piece.parameter)];
      for (int64_t i = 0; i < piece.count; ++i) {
        const int leaf = leaves.at(p.name);
        const int64_t element = reference::whole_element(p, piece.begin + i);
        const int64_t at = base + piece.at + i;
        if (!runs.empty() && runs.back().leaf == leaf && i > 0 &&
            runs.back().begin + runs.back().count == element) {
          ++runs.back().count;
        } else {
          runs.push_back({leaf, element, 1, at});
        }
      }
    }
    base += group.buffer_size;
  }
  *size = base;
  return runs;
}

}  // namespace

struct TopologyPlans::Side {
  ShardedState source;
  std::vector<FileBlueprint> target;
  std::vector<std::vector<int64_t>> elements;  // by rank: what stands in its buffer; −1: padding
};

TopologyPlans::TopologyPlans(int world, int experts) {
  reference::TrainConfig config = smallest(experts);
  std::map<std::string, int> leaves;
  std::vector<int64_t> first;  // by leaf: its first element among all
  std::vector<checkpoint::Leaf> plain;
  int64_t total = 0;
  for (const reference::ParameterInfo& info : parameters_of(config.model)) {
    leaves[info.name] = static_cast<int>(plain.size());
    first.push_back(total);
    total += numel(info.shape);
    plain.push_back({.name = info.name, .state = "fp32", .shape = info.shape, .fragments = {}});
  }
  for (const Topology& t : topologies_of(world)) {
    if (experts % t.expert != 0) continue;
    for (int stage = 0; stage <= 3; ++stage) {
      config.stage = stage;
      std::vector<TrainingState> states(static_cast<size_t>(t.world()));
      sim::Cluster cluster(t);
      reference::LayoutCache layouts;
      cluster.run([&](sim::Rank& rank) {
        states[static_cast<size_t>(rank.number())] =
            reference::Trainer(config, parallel_state(rank), &layouts).state();
      });
      auto side = std::make_unique<Side>();
      side->source.leaves = plain;
      std::vector<std::vector<bool>> held;
      for (const checkpoint::Leaf& leaf : plain) {
        held.emplace_back(static_cast<size_t>(numel(leaf.shape)), false);
      }
      for (size_t rank = 0; rank < states.size(); ++rank) {
        int64_t size = 0;
        FileBlueprint file{.path = "rank" + std::to_string(rank),
                           .kind = FileBlueprint::Kind::kSafetensors,
                           .head = {},
                           .storages = {}};
        checkpoint::StorageFill fill{.runs = {}, .copy = {}, .literal = {}};
        std::vector<int64_t>& own = side->elements.emplace_back();
        for (const Run& run : runs_of(states[rank], leaves, &size)) {
          own.resize(static_cast<size_t>(size), -1);
          fill.runs.push_back({run.leaf, run.begin, run.count, run.at});
          for (int64_t i = 0; i < run.count; ++i) {
            const size_t leaf = static_cast<size_t>(run.leaf);
            own[static_cast<size_t>(run.at + i)] = first[leaf] + run.begin + i;
            std::vector<bool>& taken = held[leaf];
            if (taken[static_cast<size_t>(run.begin + i)]) continue;  // a replica's
            taken[static_cast<size_t>(run.begin + i)] = true;
            std::vector<FileFragment>& fragments = side->source.leaf(run.leaf).fragments;
            const int64_t offset = (run.at + i) * 4;
            const int file_number = static_cast<int>(rank);
            if (!fragments.empty() && fragments.back().file == file_number &&
                fragments.back().begin + fragments.back().count == run.begin + i &&
                fragments.back().offset_bytes + 4 * fragments.back().count == offset) {
              ++fragments.back().count;
            } else {
              fragments.push_back({run.begin + i, 1, file_number, offset});
            }
          }
        }
        fill.numel = size;
        file.storages.push_back(std::move(fill));
        side->target.push_back(std::move(file));
      }
      for (checkpoint::Leaf& leaf : side->source.leaves) {
        std::sort(leaf.fragments.begin(), leaf.fragments.end(),
                  [](const FileFragment& a, const FileFragment& b) { return a.begin < b.begin; });
      }
      check_cover(side->source);
      legs_.push_back({t, stage, 0});
      sides_.push_back(std::move(side));
    }
  }
}

TopologyPlans::~TopologyPlans() = default;

std::string TopologyPlans::difference(size_t from, size_t to, bool skew) const {
  const Side &a = *sides_[from], &b = *sides_[to];
  const reshard::ReshardPlan plan = reshard::make_plan(a.source, b.target);
  std::vector<std::vector<int64_t>> found;
  for (const std::vector<int64_t>& rank : b.elements) found.emplace_back(rank.size(), -1);
  for (const reshard::Transfer& transfer : plan.transfers) {
    const std::vector<int64_t>& source = a.elements[static_cast<size_t>(transfer.source_file)];
    std::vector<int64_t>& target = found[static_cast<size_t>(transfer.target_file)];
    const int64_t begin = plan.targets[static_cast<size_t>(transfer.target_file)].storage_offset(0);
    const int64_t at = transfer.source_offset / 4, put = (transfer.target_offset - begin) / 4;
    for (int64_t i = 0; i < transfer.size_bytes / 4; ++i) {
      const size_t taken = static_cast<size_t>(at + i + (skew ? 1 : 0)) % source.size();
      target[static_cast<size_t>(put + i)] = source[taken];
    }
  }
  for (size_t rank = 0; rank < found.size(); ++rank) {
    if (found[rank] == b.elements[rank]) continue;
    return to_string(legs_[from]) + " to " + to_string(legs_[to]) + ": rank " +
           std::to_string(rank) + " gets other elements than it has";
  }
  return "";
}

}  // namespace isoshard::properties
