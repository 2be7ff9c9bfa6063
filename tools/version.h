// Which program this is, and what it was proven against.
#pragma once

#include <string>

namespace isoshard::tools {

std::string program_version();  // "isoshard 0.1.0"; part of certificates, so without the commit
std::string version_text();     // version, commit, flags, DeepSpeed and torch proven against

}  // namespace isoshard::tools
