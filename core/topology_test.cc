// Facts about topologies and about what `--to` may say.
#include "core/topology.h"

#include <gtest/gtest.h>

#include "core/error.h"

namespace isoshard {
namespace {

ErrorInfo refusal(const std::string& text) {
  try {
    parse_target(text);
  } catch (const Error& error) {
    return error.info();
  }
  ADD_FAILURE() << "accepted: " << text;
  return {};
}

TEST(Topology, PrintedFormLeavesOutDegreesOfOneButForDp) {
  EXPECT_EQ(to_string(Topology{}), "dp1");
  EXPECT_EQ(to_string(Topology{.data = 2, .sequence = 4}), "dp2.sp4");
  EXPECT_EQ(to_string(Topology{.data = 1, .sequence = 2, .tensor = 3, .expert = 4, .pipeline = 5}),
            "dp1.sp2.tp3.ep4.pp5");
}

TEST(Topology, ExpertsDoNotAddRanks) {
  const Topology topology{.data = 4, .sequence = 2, .tensor = 3, .expert = 2, .pipeline = 5};
  EXPECT_EQ(topology.zero_ranks(), 8);
  EXPECT_EQ(topology.world(), 120);
}

TEST(Topology, DegreeNamesEveryAxis) {
  const Topology topology{.data = 1, .sequence = 2, .tensor = 3, .expert = 4, .pipeline = 5};
  int expected = 1;
  for (Axis axis : {Axis::kData, Axis::kSequence, Axis::kTensor, Axis::kExpert, Axis::kPipeline}) {
    EXPECT_EQ(topology.degree(axis), expected++) << name(axis);
  }
}

TEST(Target, BlanksMayStandAroundAPartButNotInsideIt) {
  EXPECT_EQ(parse_target("pp=3, dp=2 ").topology.pipeline, 3);
  EXPECT_EQ(parse_target(" pp=3 ,dp=2").topology.data, 2);
  EXPECT_NE(refusal("dp=1 2").what, "");
  EXPECT_NE(refusal("d p=2").what, "");
  EXPECT_NE(refusal("dp=2, ").what, "");
}

TEST(Target, AxesLeftOutKeepTheSourceDegree) {
  const Topology source{.data = 2, .sequence = 4, .tensor = 8};
  const TargetSpec spec = parse_target("dp=6");
  EXPECT_EQ(spec.stage, -1);
  EXPECT_EQ(resolve(spec, source), (Topology{.data = 6, .sequence = 4, .tensor = 8}));
}

TEST(Target, EveryAxisAndTheStageAreRead) {
  const TargetSpec spec = parse_target("stage=3,pp=5,ep=4,tp=3,sp=2,dp=7");
  EXPECT_EQ(spec.stage, 3);
  EXPECT_EQ(resolve(spec, Topology{}),
            (Topology{.data = 7, .sequence = 2, .tensor = 3, .expert = 4, .pipeline = 5}));
}

TEST(Topology, MoreRanksThanCanBeCountedAreRefused) {
  const TargetSpec spec = parse_target("dp=65536,sp=65536");
  EXPECT_THROW(resolve(spec, Topology{}), Error);
  EXPECT_EQ(resolve(parse_target("dp=1000000,sp=2000"), Topology{}).sequence, 2000);
}

TEST(Target, StagesAreZeroToThree) {
  for (int stage = 0; stage <= 3; ++stage) {
    EXPECT_EQ(parse_target("stage=" + std::to_string(stage)).stage, stage);
  }
  EXPECT_EQ(refusal("stage=4").code, ErrorCode::kUsage);
  EXPECT_EQ(refusal("stage=-1").code, ErrorCode::kUsage);
}

TEST(Target, DegreesAreOneToAMillion) {
  EXPECT_EQ(parse_target("dp=1000000").topology.data, 1000000);
  for (const char* text : {"dp=0", "dp=-2", "dp=1000001", "dp=99999999999999999999"}) {
    EXPECT_EQ(refusal(text).code, ErrorCode::kUsage) << text;
  }
}

TEST(Target, ADegreeOutOfRangeIsToldWithTheRange) {
  for (const char* text : {"pp=0", "dp=2147483648", "dp=-2147483649", "dp=1000001"})
    EXPECT_NE(refusal(text).what.find("not from 1 to 1000000"), std::string::npos) << text;
  EXPECT_NE(refusal("stage=4").what.find("0 to 3"), std::string::npos);
  EXPECT_NE(refusal("dp=2147483648x").what.find("not a number"), std::string::npos);
}

TEST(Target, WhatCannotBeReadIsRefusedAndThePartIsNamed) {
  for (const char* text :
       {"", "dp", "dp=", "dp=2,", ",dp=2", "dp=2x", "dp= 2", "dp=+2", "DP=2", "xp=2", "=2",
        "dp=2;sp=2", "dp=2.0", "dp==2", "dp=2,dp=4", "stage=1,stage=1"}) {
    EXPECT_EQ(refusal(text).code, ErrorCode::kUsage) << text;
  }
  EXPECT_EQ(refusal("dp=2,xp=3").entry, "\"xp=3\"");
  EXPECT_EQ(refusal("dp=2,sp=a\nb").entry, "\"sp=a\\u{a}b\"");
}

}  // namespace
}  // namespace isoshard
