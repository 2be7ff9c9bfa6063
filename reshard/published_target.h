// What a command that was killed behind its last rename has left to do: the files beside the
// target, and the pointer. Done only where the target is proven to be what the command would make.
#pragma once

#include <string>
#include <vector>

#include "reshard/convert.h"

namespace isoshard::reshard {

// Files beside the target, and the pointer, that are not as the options ask for; paths.
std::vector<std::string> missing_beside(Storage& storage, const ConvertOptions& options);

// Copies the files, then replaces the pointer.
void place_beside(Storage& storage, const ConvertOptions& options);

// Why the folder that stands as options.target is not known to be made of this source by this plan;
// empty where it is. Reads both whole: the target against its MANIFEST.json, the source against the
// digests in the target's certificate.
std::string why_another_target(Storage& storage, const checkpoint::ShardedState& state,
                               const ReshardPlan& plan, const ConvertOptions& options);

}  // namespace isoshard::reshard
