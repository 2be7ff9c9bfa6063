#include "reshard/literal_file.h"

#include <gtest/gtest.h>

#include "checkpoint/format/zip.h"
#include "checkpoint/memory_storage.h"
#include "core/check.h"

namespace isoshard::reshard {
namespace {

using checkpoint::FileBlueprint;

std::string bytes_of(Storage& storage, const std::string& path) {
  return read_small_file(storage, path, 1 << 20);
}

TEST(LiteralFile, IsWhatTheExecutorWrites) {
  for (const auto kind : {FileBlueprint::Kind::kTorch, FileBlueprint::Kind::kSafetensors,
                          FileBlueprint::Kind::kText}) {
    FileBlueprint file{.path = "a_states.pt", .kind = kind, .head = "some head", .storages = {}};
    if (kind != FileBlueprint::Kind::kText) {
      for (const std::string& literal : {std::string(300, 'x'), std::string(), std::string(8, 0)}) {
        file.storages.push_back({.dtype = DType::kUInt8,
                                 .numel = static_cast<int64_t>(literal.size()),
                                 .runs = {},
                                 .copy = {},
                                 .literal = literal});
      }
      file.storages.push_back(  // zeros that nobody wrote down
          {.dtype = DType::kFloat32, .numel = 5, .runs = {}, .copy = {}, .literal = {}});
    }
    checkpoint::MemoryStorage storage;
    storage.make_directories("/executed");
    storage.make_directories("/literal");
    const checkpoint::ShardedState nothing;
    const StreamResult executed =
        execute(storage, nothing, make_plan(nothing, {file}), "/executed", {.workers = 1});
    const FileHash hash = write_literal_file(storage, file, "/literal", true);
    EXPECT_EQ(bytes_of(storage, "/literal/a_states.pt"),
              bytes_of(storage, "/executed/a_states.pt"));
    EXPECT_EQ(hash.path, executed.files[0].path);
    EXPECT_EQ(hash.size_bytes, executed.files[0].size_bytes);
    EXPECT_EQ(hash.ecma, executed.files[0].ecma);
    EXPECT_EQ(hash.jones, executed.files[0].jones);
  }
}

// Readers of torch look for these names.
TEST(LiteralFile, HasTheRecordsOfTorch) {
  checkpoint::MemoryStorage storage;
  FileBlueprint file{
      .path = "a.pt", .kind = FileBlueprint::Kind::kTorch, .head = "head", .storages = {}};
  file.storages.push_back(
      {.dtype = DType::kUInt8, .numel = 1, .runs = {}, .copy = {}, .literal = "x"});
  write_literal_file(storage, file, "", false);
  std::vector<std::string> names;
  for (const auto& record : checkpoint::read_zip_index(*storage.open_read("/a.pt")).records) {
    names.push_back(record.name);
  }
  EXPECT_EQ(names,
            (std::vector<std::string>{"data.pkl", ".format_version", ".storage_alignment",
                                      "byteorder", "data/0", "version", ".data/serialization_id"}));
}

TEST(LiteralFile, TakesNothingFromASource) {
  checkpoint::MemoryStorage storage;
  FileBlueprint file{.path = "a", .kind = FileBlueprint::Kind::kSafetensors, .storages = {}};
  file.storages.push_back(checkpoint::whole_fill(0, 4, DType::kFloat32));
  EXPECT_THROW(write_literal_file(storage, file, "/", false), CheckFailure);
}

}  // namespace
}  // namespace isoshard::reshard
