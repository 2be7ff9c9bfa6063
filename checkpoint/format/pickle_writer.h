// Pickle → bytes, protocol 2, with the opcodes that Python's own pickler chooses.
#pragma once

#include <string>

#include "checkpoint/format/pickle.h"

namespace isoshard::checkpoint {

// The same graph gives the same bytes, on every machine.
std::string write_pickle(const Pickle& pickle);

}  // namespace isoshard::checkpoint
