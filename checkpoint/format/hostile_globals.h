// Names of functions in a pickle that would run a program or reach the system.
#pragma once

#include <string>

#include "checkpoint/format/pickle.h"

namespace isoshard::checkpoint {

// Globals that no checkpoint needs and that would run a program or reach the system when called by
// an ordinary unpickler ("os system" and its kin); empty when there are none. Safety does not rest
// on this list: it only names the intent.
std::string find_hostile_global(const Pickle& pickle);

}  // namespace isoshard::checkpoint
