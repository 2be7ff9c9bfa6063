// One interval join serves consolidation, universal conversion and resharding.
#include "reshard/plan.h"

#include <algorithm>
#include <tuple>

#include "checkpoint/cancel.h"
#include "core/cast.h"
#include "core/check.h"
#include "core/mutant.h"

namespace isoshard::reshard {
namespace {

using checkpoint::FileFragment;
using checkpoint::Leaf;
using checkpoint::LeafRun;
using checkpoint::StorageFill;

struct Place {
  int target_file;
  int storage;
  int64_t offset_bytes;  // of the storage in its file
};

void check_runs(const checkpoint::ShardedState& state, const StorageFill& fill) {
  std::vector<LeafRun> runs = fill.runs;
  std::sort(runs.begin(), runs.end(),
            [](const LeafRun& a, const LeafRun& b) { return a.at < b.at; });
  int64_t free_from = 0;
  for (const LeafRun& run : runs) {
    CHECK(run.count > 0, "an empty run");
    CHECK(run.at >= free_from || mutant("plan_overlap_allowed"), "runs of a storage overlap");
    free_from = run.at + run.count;
    CHECK(free_from <= fill.numel, "a run leaves its storage");
    const Leaf& leaf = state.leaf(run.leaf);
    CHECK(run.begin >= 0, "a run begins before its leaf");
    CHECK(run.begin + run.count <= leaf.size_elements(), "a run leaves its leaf " + leaf.name);
    CHECK(can_cast(leaf.dtype, fill.dtype), leaf.name);
  }
}

void add_run(const checkpoint::ShardedState& state, const LeafRun& run, DType target, Place place,
             std::vector<Transfer>* transfers) {
  const Leaf& leaf = state.leaf(run.leaf);
  const int64_t source_item = item_size_bytes(leaf.dtype), target_item = item_size_bytes(target);
  auto fragment = std::upper_bound(
      leaf.fragments.begin(), leaf.fragments.end(), run.begin,
      [](int64_t begin, const FileFragment& f) { return begin < f.begin + f.count; });
  int64_t begin = run.begin;
  const int64_t end = run.begin + run.count;
  for (; begin < end; ++fragment) {
    CHECK(fragment != leaf.fragments.end(), "fragments end before the run: " + leaf.name);
    CHECK(fragment->begin <= begin || mutant("plan_gap_allowed"),
          "fragments leave a gap: " + leaf.name);
    const int64_t count = std::min(end, fragment->begin + fragment->count) - begin;
    transfers->push_back(
        {fragment->file,
         fragment->offset_bytes +
             (begin - fragment->begin + mutant("plan_source_shifted")) * source_item,
         count * source_item, place.target_file,
         place.offset_bytes +
             (run.at + (mutant("plan_target_restarts") ? 0 : begin - run.begin)) * target_item,
         place.storage, leaf.dtype, target});
    begin += count;
  }
}

}  // namespace

int64_t ReshardPlan::bytes_to_write() const {
  int64_t bytes = 0;
  for (const TargetFile& target : targets) bytes += target.size_bytes();
  return bytes;
}

int64_t ReshardPlan::bytes_to_read() const {
  int64_t bytes = 0, covered = 0;
  int file = -1;
  for (const Transfer& transfer : transfers) {
    if (transfer.source_file != file) covered = 0;
    file = transfer.source_file;
    const int64_t end = transfer.source_offset + transfer.size_bytes;
    bytes += std::max<int64_t>(
        0, end - (mutant("plan_reads_counted_twice") ? transfer.source_offset
                                                     : std::max(covered, transfer.source_offset)));
    covered = std::max(covered, end);
  }
  return bytes;
}

ReshardPlan make_plan(const checkpoint::ShardedState& state,
                      std::vector<checkpoint::FileBlueprint> blueprints) {
  ReshardPlan plan;
  plan.blueprints = std::move(blueprints);
  for (const checkpoint::FileBlueprint& blueprint : plan.blueprints) {
    checkpoint::throw_if_cancelled();
    const int file = static_cast<int>(plan.targets.size());
    plan.targets.emplace_back(blueprint);
    for (size_t i = 0; i < blueprint.storages.size(); ++i) {
      const StorageFill& fill = blueprint.storages[i];
      const int storage = static_cast<int>(i);
      const Place place{file, storage, plan.targets.back().storage_offset(storage)};
      check_runs(state, fill);
      for (const LeafRun& run : fill.runs) add_run(state, run, fill.dtype, place, &plan.transfers);
      if (fill.copy && fill.copy->size_bytes > 0) {
        CHECK(fill.copy->size_bytes == fill.size_bytes() || mutant("plan_copy_size_unchecked"),
              "a copy of another size");
        plan.transfers.push_back({fill.copy->file, fill.copy->offset_bytes, fill.copy->size_bytes,
                                  file, place.offset_bytes, storage, DType::kUInt8, DType::kUInt8});
      }
    }
  }
  std::sort(plan.transfers.begin(), plan.transfers.end(), [](const Transfer& a, const Transfer& b) {
    return std::tie(a.source_file, a.source_offset, a.target_file, a.target_offset) <
           std::tie(b.source_file, b.source_offset, b.target_file, b.target_offset);
  });
  return plan;
}

}  // namespace isoshard::reshard
