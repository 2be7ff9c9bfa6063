// A trace for eyes: as Chrome's and Perfetto's JSON, and as rank × time in SVG.
#pragma once

#include <string>

#include "core/collective_trace.h"

namespace isoshard::tools {

// The Trace Event Format (JSON object form): a process a node of `ranks_per_node` ranks, a thread a
// rank, a slice a call from its rank's coming to its going on, a tick of the scheduler shown as 100
// microseconds. Flow arrows lead from whom the others waited for (the last to come, or the sender)
// to each of them.
std::string perfetto_json(const CollectiveTrace& trace, int ranks_per_node);

// One bar a call, a row a rank; the last `most` calls where there are more.
std::string svg_picture(const CollectiveTrace& trace, size_t most);

}  // namespace isoshard::tools
