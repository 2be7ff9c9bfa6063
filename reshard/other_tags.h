// The other tags of a save folder, for whoever finds the one he asked for torn: DeepSpeed's
// `latest` names a save as soon as rank 0 has written its part (errata 24), and the whole one
// before it is named by nothing any more.
#pragma once

#include <string>
#include <vector>

#include "checkpoint/deepspeed/reader.h"

namespace isoshard::reshard {

struct OtherTag {
  std::string tag;
  bool whole = false;  // every header is there and they agree; payloads were not read
  std::string found;   // its form, or why it is not whole
};

// From the newest on, by the last number in a tag's name, down to the first that is whole; without
// `except`. At most 16. Empty where `source` is no save folder, or may not be listed.
std::vector<OtherTag> other_tags(Storage& storage, const std::string& source,
                                 const std::string& except, const checkpoint::ReadOptions& options);

// A paragraph for a person; empty if there are none.
std::string tell(const std::string& source, const std::vector<OtherTag>& tags);

}  // namespace isoshard::reshard
