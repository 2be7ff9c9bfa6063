// Facts about file names inside a tag folder.
#include "checkpoint/deepspeed/names.h"

#include <gtest/gtest.h>

namespace isoshard::checkpoint {
namespace {

using Kind = FileName::Kind;

TEST(FileName, EveryFormOfDeepSpeedIsKnown) {
  struct Row {
    const char* name;
    Kind kind;
    int dp, mp;
    const char* prefix;
  };
  const Row rows[] = {
      {"mp_rank_00_model_states.pt", Kind::kModel, 0, 0, ""},
      {"mp_rank_07_model_states.pt", Kind::kModel, 0, 7, ""},
      {"mp_rank_123_model_states.pt", Kind::kModel, 0, 123, ""},
      {"zero_pp_rank_0_mp_rank_00_model_states.pt", Kind::kModelOfRank, 0, 0, ""},
      {"zero_pp_rank_1023_mp_rank_08_model_states.pt", Kind::kModelOfRank, 1023, 8, ""},
      {"zero_pp_rank_3_mp_rank_00_optim_states.pt", Kind::kOptim, 3, 0, ""},
      {"bf16_zero_pp_rank_10_mp_rank_01_optim_states.pt", Kind::kOptim, 10, 1, "bf16_"},
      {"fp16_zero_pp_rank_2_mp_rank_00_optim_states.pt", Kind::kOptim, 2, 0, "fp16_"},
      {"zero_pp_rank_3_mp_rank_00optim_states.pt", Kind::kOptim, 3, 0, ""},  // the old name
      {"layer_03-model_00-model_states.pt", Kind::kLayer, 0, 0, ""},
      {"layer_03-model_states.pt", Kind::kLayer, 0, 0, ""},
      {"layer_0_expert_3_mp_rank_00_model_states.pt", Kind::kExpert, 0, 0, ""},
      {"expert_3_mp_rank_00_model_states.pt", Kind::kExpert, 0, 0, ""},
      {"expp_rank_1_mp_rank_00_optim_states.pt", Kind::kExpertOptim, 1, 0, ""},
  };
  for (const Row& row : rows) {
    const FileName found = parse_file_name(row.name);
    EXPECT_EQ(found.kind, row.kind) << row.name;
    EXPECT_EQ(found.dp, row.dp) << row.name;
    EXPECT_EQ(found.mp, row.mp) << row.name;
    EXPECT_EQ(found.prefix, row.prefix) << row.name;
  }
}

TEST(FileName, WhatDeepSpeedNeverWritesIsOther) {
  for (const char* name :
       {"", "latest", "mp_rank_0_model_states.pt", "mp_rank_00_model_states.pt.tmp",
        "xmp_rank_00_model_states.pt", "mp_rank_00_model_states_pt", "mp_rank_00_model_states.pt\n",
        "bf16_zero_pp_rank_0_mp_rank_00_model_states.pt",
        "zero_pp_rank_-1_mp_rank_00_optim_states.pt",
        "zero_pp_rank_99999999_mp_rank_00_optim_states.pt", "mp_rank_+1_model_states.pt",
        "fp32_zero_pp_rank_0_mp_rank_00_optim_states.pt", ".mp_rank_00_model_states.pt",
        "zero_pp_rank_0_mp_rank_00_optim_states.pt/x"}) {
    EXPECT_EQ(parse_file_name(name).kind, Kind::kOther) << name;
  }
}

TEST(FileName, EveryNameThatIsMadeIsReadBack) {
  for (int mp : {0, 7, 10, 99, 100, 12345}) {
    EXPECT_EQ(parse_file_name(model_file_name(mp)).mp, mp);
    for (int dp : {0, 9, 10, 1023, 1000000}) {
      const FileName model = parse_file_name(model_file_name_of_rank(dp, mp));
      EXPECT_EQ(model.kind, Kind::kModelOfRank);
      EXPECT_EQ(model.dp, dp);
      EXPECT_EQ(model.mp, mp);
      for (const char* prefix : {"", "bf16_", "fp16_"}) {
        const FileName optim = parse_file_name(optim_file_name(prefix, dp, mp));
        EXPECT_EQ(optim.kind, Kind::kOptim);
        EXPECT_EQ(optim.dp, dp);
        EXPECT_EQ(optim.mp, mp);
        EXPECT_EQ(optim.prefix, prefix);
      }
    }
  }
}

TEST(FileName, DataRanksAreNotPaddedAndModelRanksHaveTwoDigits) {
  EXPECT_EQ(model_file_name(0), "mp_rank_00_model_states.pt");
  EXPECT_EQ(model_file_name_of_rank(3, 0), "zero_pp_rank_3_mp_rank_00_model_states.pt");
  EXPECT_EQ(optim_file_name("", 3, 1), "zero_pp_rank_3_mp_rank_01_optim_states.pt");
  EXPECT_EQ(optim_file_name("bf16_", 12, 100), "bf16_zero_pp_rank_12_mp_rank_100_optim_states.pt");
}

}  // namespace
}  // namespace isoshard::checkpoint
