// File names inside a tag folder (deepspeed/runtime/engine.py, _get_ckpt_name and kin).
//
//   mp_rank_XX_model_states.pt                                 stages 0, 1, 2
//   zero_pp_rank_D_mp_rank_XX_model_states.pt                  stage 3
//   [bf16_|fp16_]zero_pp_rank_D_mp_rank_XX_optim_states.pt     stages 1, 2, 3
//   expp_rank_D_mp_rank_XX_optim_states.pt                     stage 0 with experts
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace isoshard::checkpoint {

struct FileName {
  enum class Kind { kModel, kModelOfRank, kOptim, kLayer, kExpert, kExpertOptim, kOther };
  Kind kind = Kind::kOther;
  int dp = 0;          // D, rank in the partition group
  int mp = 0;          // XX
  std::string prefix;  // "bf16_", "fp16_" or ""
};

FileName parse_file_name(const std::string& name);

// The name of an expert's file without its mp rank: "layer_0_expert_3".
std::string expert_in_file_name(const std::string& name);

// The number behind "layer_": 3 for "layer_03-model_states.pt".
std::optional<int64_t> layer_in_file_name(const std::string& name);

// "00", "07", "123": how file names count.
std::string two_digits(int value);

std::string model_file_name(int mp);
std::string model_file_name_of_rank(int dp, int mp);
std::string expert_optim_file_name(int expert_rank);
std::string optim_file_name(const std::string& prefix, int dp, int mp);

}  // namespace isoshard::checkpoint
