// Whose a file of a tag folder is, in words.
#pragma once

#include <string>

#include "checkpoint/deepspeed/names.h"
#include "checkpoint/deepspeed/source.h"

namespace isoshard::reshard {

// "dp rank 1, mp rank 0", from the file's name; empty where the name says no rank.
inline std::string place_of_file(const std::string& relative) {
  using Kind = checkpoint::FileName::Kind;
  const checkpoint::FileName name = checkpoint::parse_file_name(checkpoint::base_name(relative));
  const std::string mp = "mp rank " + std::to_string(name.mp);
  switch (name.kind) {
    case Kind::kModel:
      return mp;
    case Kind::kModelOfRank:
    case Kind::kOptim:
      return "dp rank " + std::to_string(name.dp) + ", " + mp;
    case Kind::kExpertOptim:
      return "ep rank " + std::to_string(name.dp) + ", " + mp;
    default:
      return "";
  }
}

}  // namespace isoshard::reshard
