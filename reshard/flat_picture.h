// A picture of the flat partitions of stages 1 and 2: what was saved, and what DeepSpeed's
// converter believes to lie there. They differ under round_robin_gradients
// (docs/deepspeed_errata.md).
//
//   what was saved              | p0 | p3 | p1 | p4 | p2 | pad |    the order of the flat buffer
//   what the converter believed | p0 | p1 | p2 | p3 | p4 | pad |    the optimizer's order
//
// Alignment padding is drawn where it shows as a gap inside a rank's partition; such padding at the
// very start of a partition is not seen.
#pragma once

#include <string>

#include "checkpoint/sharded_state.h"

namespace isoshard::reshard {

// A self-contained SVG document; the same for the same state. Throws Error(kUsage) for a source
// without flat partitions of stages 1 and 2.
std::string flat_picture(const checkpoint::ShardedState& state);

}  // namespace isoshard::reshard
