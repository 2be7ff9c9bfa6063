// Which folder a SOURCE argument means (contracts §1): a save folder with `latest`, a tag folder, a
// universal folder, a Trainer checkpoint-N, or an fp32 file or folder.
#pragma once

#include <string>
#include <vector>

#include "core/storage.h"

namespace isoshard::checkpoint {

struct SourcePlace {
  enum class Kind { kZero, kUniversal, kWeights };
  Kind kind = Kind::kZero;
  std::string folder;              // the tag or universal folder; of weights: their folder
  std::string save_folder;         // parent that holds `latest`; empty if a tag folder was named
  std::string tag;                 // last component of folder
  std::vector<std::string> files;  // kWeights: file names inside folder, in order
  bool folder_named = true;        // false: SOURCE is one file
  std::vector<std::string> notices;
};

// `tag` may be empty. Throws Error(kNotFound) that lists the tags there are.
SourcePlace resolve_source(Storage& storage, const std::string& path, const std::string& tag);

// Folders of a save folder that look like tags, or like folders that hold one (a pointer file is
// there), by name; links to folders only with `links`. Those that this user may not list are passed
// over.
std::vector<std::string> tags_in(Storage& storage, const std::string& save_folder,
                                 bool links = false);

// Of these, the folders that hold tags of their own, as Lightning and Accelerate leave them.
std::vector<std::string> save_folders_in(Storage& storage, const std::string& folder);

// What `latest` or `latest_universal` says, without blanks at both ends.
std::string pointer_text(Storage& storage, const std::string& path);

std::string join(const std::string& folder, const std::string& name);
std::string base_name(const std::string& path);
std::string parent_folder(const std::string& path);  // "." for a plain name

}  // namespace isoshard::checkpoint
