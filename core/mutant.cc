// See mutant.h. Part of builds with ISOSHARD_MUTANTS alone; CMake lists the names of all switches.
#include "core/mutant.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>

namespace isoshard {
namespace {

constexpr std::string_view kNames[] = {
#include ISOSHARD_MUTANT_NAMES
};

std::string chosen_name() {
  const char* text = std::getenv("ISOSHARD_MUTANT");
  const std::string name = text == nullptr ? "" : text;
  if (name.empty() || std::ranges::find(kNames, name) != std::end(kNames)) return name;
  std::fprintf(stderr, "ISOSHARD_MUTANT=%s: unknown mutant. There are:\n", name.c_str());
  for (const std::string_view known : kNames) {
    std::fprintf(stderr, "  %.*s\n", static_cast<int>(known.size()), known.data());
  }
  std::abort();
}

const std::string& chosen() {
  static const std::string name = chosen_name();  // read once: a process is one mutant or none
  return name;
}

[[maybe_unused]] const std::string& kAtStart = chosen();  // so that a wrong name ends every program

}  // namespace

bool mutant(std::string_view name) {
  const std::string& active = chosen();
  return !active.empty() && active == name;
}

}  // namespace isoshard
