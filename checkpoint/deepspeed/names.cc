// Patterns by RE2, which is linear in the length of the name.
#include "checkpoint/deepspeed/names.h"

#include <re2/re2.h>

#include <charconv>
#include <cstdio>
#include <string_view>
#include <system_error>

#include "core/mutant.h"

namespace isoshard::checkpoint {

FileName parse_file_name(const std::string& name) {
  static const re2::RE2 kModel("mp_rank_(\\d{2,6})_model_states\\.pt");
  static const re2::RE2 kRanked("zero_pp_rank_(\\d{1,7})_mp_rank_(\\d{2,6})_model_states\\.pt");
  static const re2::RE2 kOptim(
      "(bf16_|fp16_)?zero_pp_rank_(\\d{1,7})_mp_rank_(\\d{2,6})_?optim_states\\.pt");
  static const re2::RE2 kExpert("(layer_-?\\d+_)?expert_\\d+_mp_rank_\\d+_model_states\\.pt");
  static const re2::RE2 kExpertOptim("expp_rank_(\\d{1,7})_mp_rank_(\\d{2,6})_optim_states\\.pt");
  static const re2::RE2 kLayer("layer_\\d+-.*model_states\\.pt");
  FileName result;
  using Kind = FileName::Kind;
  if (re2::RE2::FullMatch(name, kModel, &result.mp)) {
    result.kind = Kind::kModel;
  } else if (re2::RE2::FullMatch(name, kRanked, &result.dp, &result.mp)) {
    result.kind = Kind::kModelOfRank;
  } else if (re2::RE2::FullMatch(name, kOptim, &result.prefix, &result.dp, &result.mp)) {
    result.kind = Kind::kOptim;
  } else if (re2::RE2::FullMatch(name, kExpert)) {
    result.kind = Kind::kExpert;
  } else if (re2::RE2::FullMatch(name, kExpertOptim, &result.dp, &result.mp)) {
    result.kind = Kind::kExpertOptim;
  } else if (re2::RE2::FullMatch(name, kLayer)) {
    result.kind = Kind::kLayer;
  }
  return result;
}

std::string two_digits(int value) {
  char buffer[16];
  std::snprintf(buffer, sizeof buffer, "%02d", value);
  return buffer;
}

std::optional<int64_t> layer_in_file_name(const std::string& name) {
  constexpr std::string_view kPrefix = "layer_";
  int64_t number = 0;
  if (!name.starts_with(kPrefix) ||
      std::from_chars(name.data() + kPrefix.size(), name.data() + name.size(), number).ec !=
          std::errc() ||
      number < 0)
    return std::nullopt;
  return number;
}

std::string expert_in_file_name(const std::string& name) {
  return name.substr(0, name.find("_mp_rank_"));
}

std::string model_file_name(int mp) { return "mp_rank_" + two_digits(mp) + "_model_states.pt"; }

std::string model_file_name_of_rank(int dp, int mp) {
  return "zero_pp_rank_" + std::to_string(dp) + "_mp_rank_" + two_digits(mp) + "_model_states.pt";
}

std::string expert_optim_file_name(int expert_rank) {
  return "expp_rank_" + std::to_string(expert_rank) + "_mp_rank_00_optim_states.pt";
}

std::string optim_file_name(const std::string& prefix, int dp, int mp) {
  return prefix + "zero_pp_rank_" +
         (mutant("data_rank_padded") ? two_digits(dp) : std::to_string(dp)) + "_mp_rank_" +
         two_digits(mp) + "_optim_states.pt";
}

}  // namespace isoshard::checkpoint
