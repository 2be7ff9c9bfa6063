// Mutants: mistakes that this code could hold, each switched on by its name when a program starts
// (ISOSHARD_MUTANT=name), so that tests/mutants.py can see that a test fails. Where the option
// ISOSHARD_MUTANTS is off, as in what users run, a switch is the constant false and leaves no
// instruction. It stands in .cc files alone: the definition is given file by file.
#pragma once

#include <string_view>

namespace isoshard {

#ifdef ISOSHARD_MUTANTS
// Whether the mutant is the one that this process was started with. A name that no switch has ends
// the process before main().
bool mutant(std::string_view name);
#else
constexpr bool mutant(std::string_view) { return false; }
#endif

}  // namespace isoshard
