// Names of functions in a pickle that would run a program or reach the system.
#pragma once

#include <string>

#include "checkpoint/format/pickle.h"

namespace isoshard::checkpoint {

struct HostileGlobal {
  std::string name;     // "os system"; empty when there is none
  bool called = false;  // by a REDUCE of the pickle itself, and not only named
};

// What Error::found says of one that is called.
inline constexpr const char* kCalledGlobal = "a call of it";

// The first global, if any is called the first such, that no checkpoint needs and that would run a
// program or reach the system when called by an ordinary unpickler. Safety does not rest on this
// list: it only names the intent.
HostileGlobal find_hostile_global(const Pickle& pickle);

}  // namespace isoshard::checkpoint
