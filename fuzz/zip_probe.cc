// zip_probe [--described FOLDER] FILE...: what our reader finds in archives, one JSON object a
// line, for fuzz/differential.py to compare with Python's zipfile.
//
//   {"file": …, "accepted": true, "records": [[name in hex, size, CRC, header offset, data offset,
//   CRC of the data], …]}   or   {"file": …, "accepted": false, "why": …}
//
// With --described each FILE is an input of the target zip_records; its archive is written into
// FOLDER under the same name.
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>

#include "checkpoint/format/crc.h"
#include "checkpoint/format/zip.h"
#include "fuzz/zip_records.h"

namespace isoshard::fuzz {
namespace {

std::string hex_of(const std::string& text) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string hex;
  for (const char c : text) {
    hex += kDigits[static_cast<unsigned char>(c) >> 4];
    hex += kDigits[static_cast<unsigned char>(c) & 15];
  }
  return hex;
}

// The first line of an error, which holds no text from the file.
std::string reason_of(const Error& error) {
  std::string reason = error.info().what;
  for (char& c : reason) {
    if (c == '"' || c == '\\' || static_cast<unsigned char>(c) < 32) c = '\'';
  }
  return reason;
}

std::string answer_on(const std::string& archive) {
  try {
    const checkpoint::ZipIndex index = checkpoint::read_zip_index(BytesFile(bytes_of(archive)));
    std::string records;
    for (const checkpoint::ZipRecord& record : index.records) {
      const Bytes data = bytes_of(archive).subspan(static_cast<size_t>(record.data_offset),
                                                   static_cast<size_t>(record.size_bytes));
      records += records.empty() ? "[\"" : ", [\"";
      records += hex_of(index.prefix + "/" + record.name) + "\"";
      for (const int64_t number : {record.size_bytes, int64_t{record.crc32}, record.header_offset,
                                   record.data_offset, int64_t{checkpoint::crc32_of(data)}})
        records += ", " + std::to_string(number);
      records += "]";
    }
    return R"("accepted": true, "records": [)" + records + "]";
  } catch (const Error& error) {
    return R"("accepted": false, "why": ")" + reason_of(error) + "\"";
  }
}

int run(const std::vector<std::string>& arguments) {
  namespace fs = std::filesystem;
  const bool described = arguments.size() >= 2 && arguments[0] == "--described";
  for (size_t i = described ? 2 : 0; i < arguments.size(); ++i) {
    std::ifstream file(arguments[i], std::ios::binary);
    std::string archive(std::istreambuf_iterator<char>(file), {});
    if (described) {
      archive = described_zip(bytes_of(archive)).archive;
      std::ofstream(fs::path(arguments[1]) / fs::path(arguments[i]).filename(), std::ios::binary)
          << archive;
    }
    std::cout << R"({"file": "hex:)" << hex_of(arguments[i]) << "\", " << answer_on(archive)
              << "}\n";
  }
  return std::cout.good() ? 0 : 1;
}

}  // namespace
}  // namespace isoshard::fuzz

int main(int argc, char** argv) {
  return isoshard::fuzz::run(std::vector<std::string>(argv + 1, argv + argc));
}
