// Whether a record's bytes are those that its CRC was made of, and which failures of reading say
// that bytes on the disk are gone, not that this machine or this user cannot reach them.
#pragma once

#include <string>

#include "checkpoint/format/zip.h"
#include "core/error.h"

namespace isoshard::checkpoint {

// The disk itself lost what stood there (EIO). A lack of memory, file handles or rights is none.
bool is_bad_sector(const ErrorInfo& info);

// What is wrong, without the file's name.
std::string one_line(const ErrorInfo& info);

// Why a record is not proven; empty where its CRC is right. Reads its payload. Throws what reading
// throws, but for a bad sector, which is a reason.
std::string why_unproven(const ReadableFile& file, const ZipRecord& record);

}  // namespace isoshard::checkpoint
