// Whole files at once: a pointer that is replaced in one step, a file that goes along unread.
#pragma once

#include <string>

#include "core/storage.h"

namespace isoshard::checkpoint {

// Makes the file, which must not be there yet, with all its bytes durable; its name is not.
void write_new_file(Storage& storage, const std::string& path, const std::string& bytes);

// Replaces `path`, or makes it, in one step: readers see the old text or the new, never a mixture.
void replace_small_file(Storage& storage, const std::string& path, const std::string& text);

// The same with the bytes of another file; and whether two files hold the same bytes.
void copy_file(Storage& storage, const std::string& from, const std::string& to);
bool same_bytes(Storage& storage, const std::string& a, const std::string& b);

}  // namespace isoshard::checkpoint
