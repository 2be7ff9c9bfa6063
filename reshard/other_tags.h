// The other tags of a save folder, for whoever finds the one he asked for torn: DeepSpeed's
// `latest` names a save as soon as rank 0 has written its part (errata 24), and the whole one
// before it is named by nothing any more.
#pragma once

#include <string>
#include <vector>

#include "checkpoint/deepspeed/reader.h"

namespace isoshard::reshard {

struct OtherTag {
  enum class State {
    kWhole,    // doctor finds nothing, and files and sizes are the manifest's; payloads are unread
    kNot,      // `found` says why
    kUnknown,  // it could not be looked at
  };
  std::string tag;
  State state = State::kNot;
  std::string found;  // the form of a whole one
};

// By the last number in a tag's name, the highest first, down to the first that is whole; without
// `except`, names that --tag does not take, and folders with tags of their own. At most 16. Empty
// where `source` may not be listed.
std::vector<OtherTag> other_tags(Storage& storage, const std::string& source,
                                 const std::string& except, const checkpoint::ReadOptions& options);

// A paragraph for a person; empty if there are none.
std::string tell(const std::vector<OtherTag>& tags);

// The folder with `latest` that SOURCE means: itself, or the only one below it; else empty.
std::string save_folder_of(Storage& storage, const std::string& source);

}  // namespace isoshard::reshard
