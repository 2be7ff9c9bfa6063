// Making a plan: fragments of a ZeRO-3 source joined with one target file a tensor.
#include <benchmark/benchmark.h>

#include <string>
#include <vector>

#include "checkpoint/torch_builder.h"
#include "core/check.h"
#include "core/layout.h"
#include "core/zero_rules.h"
#include "reshard/plan.h"

namespace isoshard {
namespace {

constexpr int64_t kElements = 1'000'003;  // of each tensor; no degree divides it

// `tensors` fp32 leaves cut into slots over `ranks` files, as stage 3 lays them out.
checkpoint::ShardedState source_of(int64_t tensors, int ranks) {
  checkpoint::ShardedState state;
  const int64_t slot = slot_size(kElements, ranks);
  for (int64_t i = 0; i < tensors; ++i) {
    checkpoint::Leaf leaf{
        .name = "p" + std::to_string(i), .state = "fp32", .shape = {kElements}, .fragments = {}};
    for (const RankFragment& f : fragments({kElements, ranks, SlotShard{i * slot, slot}})) {
      leaf.fragments.push_back({f.begin, f.count, f.rank, 4 * f.offset_local});
    }
    state.add_leaf(std::move(leaf));
  }
  return state;
}

std::vector<checkpoint::FileBlueprint> targets_of(const checkpoint::ShardedState& state) {
  std::vector<checkpoint::FileBlueprint> files;
  for (size_t i = 0; i < state.leaves.size(); ++i) {
    checkpoint::TorchBuilder builder;
    const int storage = builder.add_storage({.dtype = DType::kFloat32,
                                             .numel = kElements,
                                             .runs = {{static_cast<int>(i), 0, kElements, 0}},
                                             .copy = {},
                                             .literal = {}});
    const checkpoint::NodeId root = builder.tensor({.shape = {kElements}, .storage = storage});
    files.push_back(builder.finish("zero/" + state.leaves[i].name + "/fp32.pt", root));
  }
  return files;
}

void make_plan(benchmark::State& state) {
  const checkpoint::ShardedState source =
      source_of(state.range(0), static_cast<int>(state.range(1)));
  const std::vector<checkpoint::FileBlueprint> targets = targets_of(source);
  CHECK(reshard::make_plan(source, targets).bytes_to_read() == 4 * kElements * state.range(0),
        "cover");
  for (auto _ : state) {
    benchmark::DoNotOptimize(reshard::make_plan(source, targets).transfers.size());
  }
  state.SetItemsProcessed(state.iterations() * state.range(0) * state.range(1));  // fragments
}

BENCHMARK(make_plan)
    ->Args({1000, 8})
    ->Args({1000, 512})
    ->Args({10000, 64})
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace isoshard
