// Which records of a torn file are proven. Once data.pkl is known, so is the place of every byte
// that is no payload: torch writes the records in one order, without gaps, under names that follow
// from their numbers. So nothing is searched for, and no name is believed that only a local header
// has, which no CRC covers:
//
//   | data.pkl | .format_version | .storage_alignment | byteorder | data/0 | data/1 | … | version |
//   `- each header and descriptor byte for byte where it must be, each CRC right -> proven   ^
//   break
//
// Behind the first break nothing is proven by itself: a save into an existing file does not cut it
// off first, so that there may be whole records of an older save. The directory proves them where
// it agrees with all that was proven before the break, and with the record.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "checkpoint/format/torn_file.h"
#include "checkpoint/format/zip.h"

namespace isoshard::checkpoint {

class TornChain {
 public:
  // `torn`: its prefix, pickle and the storages' sizes.
  TornChain(const ReadableFile& file, TornFile* torn);

  // Sets the record of each storage that is proven, and of the others why they are not. Reads
  // payloads. Throws Error(kCorrupt) where a proven record says that the file is of another
  // byte order or version.
  void prove();

 private:
  struct Link {
    std::string content;  // what a small record must hold
    bool proven = false;
    std::string why;  // it is not
    uint32_t crc32 = 0;
    std::optional<uint32_t> in_directory;  // the directory's CRC, where its entry fits otherwise
  };

  void add(const std::string& name, int64_t size_bytes, const std::string& content = "");
  std::string bytes_at(int64_t offset, int64_t most) const;
  void walk();
  std::string why_broken(int number);
  void refuse_other_content(int number) const;
  void read_directory();
  size_t judge_directory();
  void prove_by_directory(size_t begin);
  void hand_over();
  ZipRecord record(size_t number) const;

  const ReadableFile& file_;
  int64_t size_;
  TornFile& torn_;
  ZipLayout layout_;
  std::vector<Link> links_;   // by record of the layout
  std::string break_reason_;  // at the first break
};

}  // namespace isoshard::checkpoint
