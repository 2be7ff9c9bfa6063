// See verify.h: the words of a verdict, and the verdict that an error means.
#include "core/error.h"
#include "reshard/verify.h"

namespace isoshard::reshard {

std::optional<Verdict> verdict_of(ErrorCode code) {
  switch (code) {
    case ErrorCode::kCorrupt:
    case ErrorCode::kMismatch:
      return Verdict::kCorrupt;
    case ErrorCode::kIncomplete:
    case ErrorCode::kNotFound:
      return Verdict::kIncomplete;
    case ErrorCode::kHostile:
    case ErrorCode::kLimit:
      return Verdict::kHostile;
    default:
      return std::nullopt;
  }
}

const char* name(Verdict verdict) {
  switch (verdict) {
    case Verdict::kVerified:
      return "VERIFIED";
    case Verdict::kComplete:
      return "COMPLETE";
    case Verdict::kSuspect:
      return "SUSPECT";
    case Verdict::kIncomplete:
      return "INCOMPLETE";
    case Verdict::kCorrupt:
      return "CORRUPT";
    case Verdict::kHostile:
      break;
  }
  return "HOSTILE";
}

}  // namespace isoshard::reshard
