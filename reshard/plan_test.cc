// Facts about the plan: where each byte comes from, and which plans are our own bugs.
#include "reshard/plan.h"

#include <gtest/gtest.h>

#include <tuple>

#include "core/check.h"

namespace isoshard::reshard {
namespace {

using checkpoint::FileBlueprint;
using checkpoint::LeafRun;
using checkpoint::ShardedState;
using checkpoint::SourceBytes;
using checkpoint::StorageFill;

// source file, source offset, size, target file, target offset, storage
using Row = std::tuple<int, int64_t, int64_t, int, int64_t, int>;

std::vector<Row> rows(const ReshardPlan& plan) {
  std::vector<Row> result;
  for (const Transfer& t : plan.transfers) {
    result.emplace_back(t.source_file, t.source_offset, t.size_bytes, t.target_file,
                        t.target_offset, t.storage);
  }
  return result;
}

// Ten floats: four in file 0 at byte 100, three in file 1 at byte 8, three in file 0 at byte 200.
ShardedState ten() {
  ShardedState state;
  state.files.resize(2);
  state.add_leaf({.name = "t",
                  .state = "weight",
                  .dtype = DType::kFloat32,
                  .shape = {2, 5},
                  .fragments = {{0, 4, 0, 100}, {4, 3, 1, 8}, {7, 3, 0, 200}}});
  return state;
}

StorageFill fill_of(DType dtype, int64_t numel, std::vector<LeafRun> runs) {
  return {.dtype = dtype, .numel = numel, .runs = std::move(runs), .copy = {}, .literal = {}};
}

// A file of an eight-byte head and the given storages behind one another.
FileBlueprint file_of(std::vector<StorageFill> storages, const std::string& path = "f") {
  return {.path = path,
          .kind = FileBlueprint::Kind::kSafetensors,
          .head = "12345678",
          .storages = std::move(storages)};
}

ReshardPlan plan_of(const ShardedState& state, StorageFill fill) {
  return make_plan(state, {file_of({std::move(fill)})});
}

TEST(Plan, ARunOverSeveralFragmentsIsCutAtEachAndSortedBySource) {
  // Elements 2 to 9 of the leaf go to elements 3 to 10 of a storage of 12.
  const ReshardPlan plan = plan_of(ten(), fill_of(DType::kFloat32, 12, {{0, 2, 7, 3}}));
  EXPECT_EQ(rows(plan), (std::vector<Row>{{0, 108, 8, 0, 8 + 12, 0},
                                          {0, 200, 8, 0, 8 + 12 + 20, 0},
                                          {1, 8, 12, 0, 8 + 12 + 8, 0}}));
}

TEST(Plan, ARunInsideOneFragmentIsOneTransfer) {
  const ReshardPlan plan = plan_of(ten(), fill_of(DType::kFloat32, 2, {{0, 5, 2, 0}}));
  EXPECT_EQ(rows(plan), (std::vector<Row>{{1, 12, 8, 0, 8, 0}}));
}

TEST(Plan, RunsThatTouchFragmentEndsTakeNothingFromTheNeighbours) {
  const ReshardPlan plan = plan_of(ten(), fill_of(DType::kFloat32, 3, {{0, 4, 3, 0}}));
  EXPECT_EQ(rows(plan), (std::vector<Row>{{1, 8, 12, 0, 8, 0}}));
}

TEST(Plan, ACastCountsSourceBytesAndPlacesTargetElements) {
  const ReshardPlan plan = plan_of(ten(), fill_of(DType::kBFloat16, 12, {{0, 2, 7, 3}}));
  EXPECT_EQ(rows(plan), (std::vector<Row>{{0, 108, 8, 0, 8 + 6, 0},
                                          {0, 200, 8, 0, 8 + 6 + 10, 0},
                                          {1, 8, 12, 0, 8 + 6 + 4, 0}}));
  for (const Transfer& t : plan.transfers) {
    EXPECT_EQ(t.source_dtype, DType::kFloat32);
    EXPECT_EQ(t.target_dtype, DType::kBFloat16);
  }
}

TEST(Plan, StoragesAndFilesAreNumberedAndPlaced) {
  const ShardedState state = ten();
  const ReshardPlan plan =
      make_plan(state, {file_of({fill_of(DType::kFloat32, 1, {{0, 0, 1, 0}}),
                                 fill_of(DType::kFloat32, 1, {{0, 1, 1, 0}})},
                                "a"),
                        file_of({fill_of(DType::kFloat32, 1, {{0, 2, 1, 0}})}, "b")});
  EXPECT_EQ(rows(plan),
            (std::vector<Row>{{0, 100, 4, 0, 8, 0}, {0, 104, 4, 0, 12, 1}, {0, 108, 4, 1, 8, 0}}));
  EXPECT_EQ(plan.targets[1].path(), "b");
  EXPECT_EQ(plan.bytes_to_write(), 16 + 12);
}

TEST(Plan, ACopyOfSourceBytesIsOneTransferOfBytes) {
  StorageFill fill = fill_of(DType::kInt64, 3, {});
  fill.copy = SourceBytes{1, 40, 24};
  const ReshardPlan plan = plan_of(ten(), fill);
  EXPECT_EQ(rows(plan), (std::vector<Row>{{1, 40, 24, 0, 8, 0}}));
  EXPECT_EQ(plan.transfers[0].source_dtype, DType::kUInt8);
}

TEST(Plan, ACopyOfNothingMovesNothing) {
  StorageFill fill = fill_of(DType::kInt64, 0, {});
  fill.copy = SourceBytes{1, 40, 0};
  EXPECT_TRUE(plan_of(ten(), fill).transfers.empty());
}

TEST(Plan, BytesReadAreCountedOnceHoweverManyTargetsTheyHave) {
  const ReshardPlan plan =
      make_plan(ten(), {file_of({fill_of(DType::kFloat32, 10, {{0, 0, 10, 0}})}, "a"),
                        file_of({fill_of(DType::kFloat32, 6, {{0, 2, 6, 0}})}, "b"),
                        file_of({fill_of(DType::kBFloat16, 10, {{0, 0, 10, 0}})}, "c")});
  EXPECT_EQ(plan.bytes_to_read(), 40);
  EXPECT_EQ(plan.bytes_to_write(), 3 * 8 + 40 + 24 + 20);
}

TEST(Plan, StoragesMayHaveHolesBetweenTheirRuns) {
  const ReshardPlan plan =
      plan_of(ten(), fill_of(DType::kFloat32, 100, {{0, 0, 1, 0}, {0, 9, 1, 99}}));
  EXPECT_EQ(plan.transfers.size(), 2u);
  EXPECT_EQ(plan.bytes_to_write(), 8 + 400);
}

TEST(Plan, RunsOfAStorageThatOverlapAreOurBug) {
  EXPECT_THROW(plan_of(ten(), fill_of(DType::kFloat32, 12, {{0, 0, 5, 0}, {0, 5, 5, 4}})),
               CheckFailure);
  EXPECT_THROW(plan_of(ten(), fill_of(DType::kFloat32, 12, {{0, 0, 1, 7}, {0, 0, 1, 7}})),
               CheckFailure);
  EXPECT_THROW(plan_of(ten(), fill_of(DType::kFloat32, 12, {{0, 0, 1, 6}, {0, 0, 5, 2}})),
               CheckFailure);
  plan_of(ten(), fill_of(DType::kFloat32, 12, {{0, 0, 1, 7}, {0, 0, 5, 2}}));
}

TEST(Plan, RunsOutsideTheirLeafOrStorageAreOurBug) {
  for (const LeafRun& run : {LeafRun{0, 0, 0, 0},
                             {0, 0, -1, 0},
                             {0, -1, 1, 0},
                             {0, 9, 2, 0},
                             {0, 10, 1, 0},
                             {0, 0, 2, 11},
                             {0, 0, 1, -1},
                             {0, 0, 1, 12}}) {
    EXPECT_THROW(plan_of(ten(), fill_of(DType::kFloat32, 12, {run})), CheckFailure)
        << run.begin << " " << run.count << " " << run.at;
  }
}

TEST(Plan, ACastThatIsNotKnownIsOurBug) {
  EXPECT_THROW(plan_of(ten(), fill_of(DType::kInt64, 12, {{0, 0, 1, 0}})), CheckFailure);
}

TEST(Plan, ACopyOfAnotherSizeIsOurBug) {
  StorageFill fill = fill_of(DType::kInt64, 3, {});
  fill.copy = SourceBytes{1, 40, 23};
  EXPECT_THROW(plan_of(ten(), fill), CheckFailure);
}

TEST(Plan, FragmentsThatLeaveAHoleAreOurBug) {
  ShardedState state = ten();
  state.leaf(0).fragments = {{0, 4, 0, 100}, {5, 5, 1, 8}};
  EXPECT_THROW(plan_of(state, fill_of(DType::kFloat32, 10, {{0, 0, 10, 0}})), CheckFailure);
  EXPECT_THROW(plan_of(state, fill_of(DType::kFloat32, 10, {{0, 4, 1, 0}})), CheckFailure);
  state.leaf(0).fragments = {{0, 4, 0, 100}};
  EXPECT_THROW(plan_of(state, fill_of(DType::kFloat32, 10, {{0, 0, 10, 0}})), CheckFailure);
  EXPECT_EQ(plan_of(state, fill_of(DType::kFloat32, 10, {{0, 0, 4, 0}})).transfers.size(), 1u);
}

TEST(Plan, AStateWhoseFragmentsDoNotCoverIsOurBug) {
  ShardedState state = ten();
  check_cover(state);
  state.leaf(0).fragments = {{0, 4, 0, 100}, {3, 6, 1, 8}};
  EXPECT_THROW(check_cover(state), CheckFailure);
  state.leaf(0).fragments = {{0, 4, 0, 100}, {4, 0, 1, 8}, {4, 6, 1, 8}};
  EXPECT_THROW(check_cover(state), CheckFailure);
  state.leaf(0).fragments = {{0, 4, 0, 100}};
  EXPECT_THROW(check_cover(state), CheckFailure);
}

TEST(Plan, NothingIsPlannedForNothing) {
  const ReshardPlan plan = make_plan(ten(), {});
  EXPECT_EQ(plan.bytes_to_read(), 0);
  EXPECT_EQ(plan.bytes_to_write(), 0);
}

}  // namespace
}  // namespace isoshard::reshard
