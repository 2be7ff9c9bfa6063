// Two buffers of one dtype added, or the larger taken, element by element: what communicators that
// reduce on the host do, one rank after the other.
#pragma once

#include "core/communicator.h"

namespace isoshard {

// target[i] = target[i] + source[i], rounded to the dtype, or the larger of both. Of as many
// elements; integers wrap around. A NaN in `target` stays where kMax meets it.
void reduce_into(Buffer target, ConstBuffer source, Reduction reduction);

}  // namespace isoshard
