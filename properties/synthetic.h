// A checkpoint folder of a made-up job, as DeepSpeed would have saved it: partitions from
// reference/, pickles by hand after the format's description. Nothing of core/zero_rules.h,
// core/layout.h or the writers is used, so what production reads here is a second derivation.
// Every padding element is poison(dtype).
#pragma once

#include <string>

#include "core/storage.h"
#include "properties/model.h"

namespace isoshard::properties {

// Writes the files of job.stage 1, 2 or 3 into `folder`, which is made.
void write_source(Storage& storage, const std::string& folder, const Model& model, const Job& job);

// The order of the optimizer's parameters for ReadOptions::param_order (stage 0 records no names).
void write_param_order(Storage& storage, const std::string& path, const Model& model);

}  // namespace isoshard::properties
