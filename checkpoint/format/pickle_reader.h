// The restricted unpickler: bytes → Pickle. It never calls, imports or looks anything up.
#pragma once

#include <cstdint>
#include <string>

#include "checkpoint/format/pickle.h"

namespace isoshard::checkpoint {

// Budgets against resource bombs; exceeding one is Error(kLimit) that names it and the byte.
struct PickleLimits {
  int64_t stream_bytes = 128ll << 20;
  int64_t memory_bytes = 160ll << 20;  // of the stream and of all that is made of it, estimated
  int64_t text_bytes = 16 << 20;       // one string
  int64_t integer_bytes = 1024;
  int nesting = 1000;
};

// Accepts the opcodes that torch and DeepSpeed write under protocol 2; anything else is refused by
// name with its offset. Refuses cycles, duplicate and unhashable dictionary keys, sparse or
// rewritten memo slots, and bytes after STOP. `file` names the source in messages.
Pickle read_pickle(const std::string& bytes, const std::string& file,
                   const PickleLimits& limits = {});

}  // namespace isoshard::checkpoint
