// Faults of reads: where they stand, what they say, and that they leave other numbers alone.
#include "sim/simulated_storage.h"

#include <gtest/gtest.h>

#include "checkpoint/memory_storage.h"
#include "core/error.h"
#include "sim/caught.h"
#include "sim/cluster.h"

namespace isoshard::sim {
namespace {

constexpr int kReads = 4;

class Reads : public ::testing::Test {
 protected:
  Reads() {
    const auto file = disk_.create("/numbers");
    std::vector<std::byte> bytes;
    for (int i = 0; i < 8 * kReads; ++i) bytes.push_back(static_cast<std::byte>(i));
    file->write_at(0, bytes);
    file->close();
  }

  // Rank 1 reads the file in pieces, and both meet in a barrier.
  Error run(const Faults& faults) {
    done_ = 0;
    Cluster cluster({.data = 2}, {.faults = faults});
    const Error error = caught(cluster, [&](Rank& rank) {
      if (rank.number() == 1) read(rank);
      rank.group(GroupKind::kWorld).barrier();
    });
    dead_ = cluster.dead();
    struck_ = cluster.struck();
    return error;
  }

  void read(Rank& rank) {
    const auto file = rank.storage(disk_).open_read("/numbers");
    EXPECT_EQ(file->size_bytes(), 8 * kReads);
    for (int i = 0; i < kReads; ++i) {
      target_.assign(8, std::byte{0xEE});
      file->read_at(8 * i, target_);
      EXPECT_EQ(target_[0], static_cast<std::byte>(8 * i));
      ++done_;
    }
    reads_ = rank.reads(), operations_ = rank.operations();
  }

  checkpoint::MemoryStorage disk_;
  std::vector<std::byte> target_;
  std::vector<int> dead_;
  std::vector<FaultKind> struck_;
  int done_ = 0;
  int64_t reads_ = 0, operations_ = 0;
};

TEST_F(Reads, AreCountedApart) {
  EXPECT_EQ(run({}).info().what, "nothing was thrown");
  EXPECT_EQ(reads_, kReads);
  EXPECT_EQ(operations_, 1);  // the file was opened
}

TEST_F(Reads, ADeathAtEachOfThem) {
  for (const FaultKind kind :
       {FaultKind::kDieBefore, FaultKind::kDieInside, FaultKind::kDieAfter}) {
    for (int at = 0; at < kReads; ++at) {
      const Error error = run({{.kind = kind, .rank = 1, .operation = at, .of_reads = true}});
      EXPECT_EQ(error.info().code, ErrorCode::kInterrupted);
      EXPECT_EQ(error.info().entry, "rank 1 died");
      EXPECT_EQ(dead_, std::vector<int>{1});
      EXPECT_EQ(done_, at);
      const std::byte first = static_cast<std::byte>(8 * at), last = first | std::byte{7};
      EXPECT_EQ(target_.front(), kind == FaultKind::kDieBefore ? std::byte{0xEE} : first);
      EXPECT_EQ(target_.back(), kind == FaultKind::kDieAfter ? last : std::byte{0xEE});
    }
  }
}

TEST_F(Reads, AnErrorOfTheDeviceNamesFileAndPlaceAndFillsNothing) {
  for (int at = 0; at < kReads; ++at) {
    const Error error =
        run({{.kind = FaultKind::kIoError, .rank = 1, .operation = at, .of_reads = true}});
    EXPECT_EQ(error.info().code, ErrorCode::kUnreadable);
    EXPECT_EQ(error.info().what, "On rank 1: Reading from the file failed: input/output error.");
    EXPECT_EQ(error.info().file, "/numbers");
    EXPECT_EQ(error.info().entry, "8 bytes at offset " + std::to_string(8 * at));
    EXPECT_EQ(error.info().found, "errno 5, EIO");
    EXPECT_EQ(target_, std::vector<std::byte>(8, std::byte{0xEE}));
    EXPECT_EQ(struck_, std::vector<FaultKind>{FaultKind::kIoError});
    EXPECT_EQ(done_, at);
  }
}

TEST_F(Reads, AnErrorOfOneReadLeavesTheNextOneAlone) {
  Cluster cluster({}, {.faults = {{.kind = FaultKind::kStaleHandle, .of_reads = true}}});
  cluster.run([&](Rank& rank) {
    const auto file = rank.storage(disk_).open_read("/numbers");
    std::vector<std::byte> bytes(8);
    EXPECT_THROW(file->read_at(8, bytes), Error);
    file->read_at(8, bytes);
    EXPECT_EQ(bytes[0], std::byte{8});
    EXPECT_EQ(rank.reads(), 2);
  });
}

TEST_F(Reads, WhatDoesNotFitAReadDoesNothing) {
  for (const FaultKind kind : {FaultKind::kDiskFull, FaultKind::kQuota, FaultKind::kReadOnly,
                               FaultKind::kNoPermission, FaultKind::kDrop, FaultKind::kDelay}) {
    const Error error = run({{.kind = kind, .rank = 1, .of_reads = true}});
    EXPECT_EQ(error.info().what, "nothing was thrown") << name(kind);
    EXPECT_TRUE(struck_.empty()) << name(kind);
  }
}

TEST_F(Reads, AnErrorOfTheDeviceFitsAnyOtherOperationToo) {
  const Error error = run({{.kind = FaultKind::kIoError, .rank = 1, .operation = 0}});
  EXPECT_EQ(error.info().code, ErrorCode::kUnreadable);
  EXPECT_EQ(error.info().what, "On rank 1: The disk failed: input/output error.");
  EXPECT_EQ(done_, 0);
}

}  // namespace
}  // namespace isoshard::sim
