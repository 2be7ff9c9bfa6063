// Commit and flags come from the build.
#include "tools/version.h"

namespace isoshard::tools {

std::string program_version() { return "isoshard " ISOSHARD_VERSION; }

std::string version_text() {
  return program_version() +
         " (commit " ISOSHARD_COMMIT ", " ISOSHARD_FLAGS
         ")\n"
         "proven against DeepSpeed 0.19.8, 0.16.9 and 0.14.5 files, torch 2.13.0";
}

}  // namespace isoshard::tools
