// For tests: a run of a cluster that is to fail.
#pragma once

#include <functional>

#include "core/error.h"
#include "sim/cluster.h"

namespace isoshard::sim {

// The Error of the run; one that says so where the run went well.
inline Error caught(Cluster& cluster, const std::function<void(Rank&)>& body) {
  try {
    cluster.run(body);
  } catch (const Error& error) {
    return error;
  }
  return Error(ErrorCode::kUsage, "nothing was thrown");
}

}  // namespace isoshard::sim
