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

// The model's tensors as leaves, and a run's ranks as files of them.
class TopologyPlans::Sides {
 public:
  explicit Sides(const reference::TrainConfig& config) : config_(config) {
    int64_t total = 0;
    for (const reference::ParameterInfo& info : parameters_of(config.model)) {
      leaves_[info.name] = static_cast<int>(plain_.size());
      first_.push_back(total);
      total += numel(info.shape);
      plain_.push_back({.name = info.name, .state = "fp32", .shape = info.shape, .fragments = {}});
    }
  }

  std::unique_ptr<Side> make(const Leg& leg) {
    reference::TrainConfig config = config_;
    config.stage = leg.stage;
    std::vector<TrainingState> states(static_cast<size_t>(leg.topology.world()));
    sim::Cluster cluster(leg.topology);
    reference::LayoutCache layouts;
    cluster.run([&](sim::Rank& rank) {
      states[static_cast<size_t>(rank.number())] =
          reference::Trainer(config, parallel_state(rank), &layouts).state();
    });
    auto side = std::make_unique<Side>();
    side->source.leaves = plain_;
    held_.clear();
    for (const checkpoint::Leaf& leaf : plain_) {
      held_.emplace_back(static_cast<size_t>(numel(leaf.shape)), false);
    }
    for (const TrainingState& state : states) add_rank(state, side.get());
    for (checkpoint::Leaf& leaf : side->source.leaves) {
      std::ranges::sort(leaf.fragments, {}, &FileFragment::begin);
    }
    check_cover(side->source);
    return side;
  }

 private:
  void add_rank(const TrainingState& state, Side* side) {
    const int rank = static_cast<int>(side->target.size());
    int64_t size = 0;
    checkpoint::StorageFill fill{.runs = {}, .copy = {}, .literal = {}};
    const std::vector<Run> runs = runs_of(state, leaves_, &size);
    std::vector<int64_t>& own = side->elements.emplace_back(static_cast<size_t>(size), -1);
    for (const Run& run : runs) {
      fill.runs.push_back({run.leaf, run.begin, run.count, run.at});
      for (int64_t i = 0; i < run.count; ++i) {
        own[static_cast<size_t>(run.at + i)] =
            first_[static_cast<size_t>(run.leaf)] + run.begin + i;
        add_element(run.leaf, run.begin + i, rank, (run.at + i) * 4, &side->source);
      }
    }
    fill.numel = size;
    FileBlueprint file{.path = "rank" + std::to_string(rank),
                       .kind = FileBlueprint::Kind::kSafetensors,
                       .head = {},
                       .storages = {}};
    file.storages.push_back(std::move(fill));
    side->target.push_back(std::move(file));
  }

  // Of replicas the first rank's is the source.
  void add_element(int leaf, int64_t element, int rank, int64_t offset, ShardedState* source) {
    std::vector<bool>& held = held_[static_cast<size_t>(leaf)];
    if (held[static_cast<size_t>(element)]) return;
    held[static_cast<size_t>(element)] = true;
    std::vector<FileFragment>& fragments = source->leaf(leaf).fragments;
    if (!fragments.empty()) {
      FileFragment& last = fragments.back();
      if (last.file == rank && last.begin + last.count == element &&
          last.offset_bytes + 4 * last.count == offset) {
        ++last.count;
        return;
      }
    }
    fragments.push_back({element, 1, rank, offset});
  }

  reference::TrainConfig config_;
  std::map<std::string, int> leaves_;
  std::vector<int64_t> first_;  // by leaf: its first element among all
  std::vector<checkpoint::Leaf> plain_;
  std::vector<std::vector<bool>> held_;  // by leaf: elements that a rank has so far
};

TopologyPlans::TopologyPlans(int world, int experts) {
  Sides sides(smallest(experts));
  for (const Topology& t : topologies_of(world)) {
    if (experts % t.expert != 0) continue;
    for (int stage = 0; stage <= 3; ++stage) {
      legs_.push_back({t, stage, 0});
      sides_.push_back(sides.make(legs_.back()));
    }
  }
}

TopologyPlans::~TopologyPlans() = default;

std::string TopologyPlans::difference(size_t from, size_t to, bool skew) const {
  const Side &a = *sides_[from], &b = *sides_[to];
  reshard::ReshardPlan plan = reshard::make_plan(a.source, b.target);
  if (skew) {
    for (reshard::Transfer& transfer : plan.transfers) {
      if (transfer.source_offset >= 4) transfer.source_offset -= 4;
    }
  }
  std::vector<std::vector<int64_t>> found;
  for (const std::vector<int64_t>& rank : b.elements) found.emplace_back(rank.size(), -1);
  for (const reshard::Transfer& transfer : plan.transfers) {
    const std::vector<int64_t>& source = a.elements[static_cast<size_t>(transfer.source_file)];
    std::vector<int64_t>& own = found[static_cast<size_t>(transfer.target_file)];
    const int64_t begin = plan.targets[static_cast<size_t>(transfer.target_file)].storage_offset(0);
    const int64_t at = transfer.source_offset / 4, put = (transfer.target_offset - begin) / 4;
    for (int64_t i = 0; i < transfer.size_bytes / 4; ++i) {
      own[static_cast<size_t>(put + i)] = source[static_cast<size_t>(at + i)];
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
