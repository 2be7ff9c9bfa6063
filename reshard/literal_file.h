// A file whose every byte its blueprint already has, as a rank's own files are when it saves: made
// in memory and written at once. The executor is for bytes that have to be fetched.
#pragma once

#include <string>

#include "checkpoint/blueprint.h"
#include "core/storage.h"
#include "reshard/executor.h"

namespace isoshard::reshard {

// Makes the file under `folder`, which exists, with the bytes that execute() would write there. No
// storage may have runs or a copy. `sync`: durable when this returns.
FileHash write_literal_file(Storage& storage, const checkpoint::FileBlueprint& blueprint,
                            const std::string& folder, bool sync);

}  // namespace isoshard::reshard
