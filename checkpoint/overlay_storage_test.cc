#include "checkpoint/overlay_storage.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "checkpoint/shallow_json.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

class OverlayTest : public ::testing::Test {
 protected:
  void SetUp() override {
    root_ =
        std::filesystem::temp_directory_path() / ("isoshard-overlay-" + std::to_string(::getpid()));
    for (const char* folder : {"a/tag", "b/tag", "c"})
      std::filesystem::create_directories(root_ / folder);
    write("a/tag/one", "1");
    write("b/tag/two", "2");
    write("b/latest", "tag");
  }
  void TearDown() override { std::filesystem::remove_all(root_); }
  void write(const std::string& name, const std::string& text) {
    std::ofstream(root_ / name) << text;
  }
  std::string path(const std::string& name) const { return (root_ / name).string(); }

  std::filesystem::path root_;
  OverlayStorage storage_;
};

TEST_F(OverlayTest, ShowsTheFilesOfAllFolders) {
  storage_.lay_over(path("a") + "/", {path("b"), path("c")});
  const std::vector<DirectoryEntry> entries = storage_.list(path("a/tag"));
  ASSERT_EQ(entries.size(), 2U);
  EXPECT_EQ(entries[0].name, "one");
  EXPECT_EQ(entries[1].name, "two");
  EXPECT_TRUE(storage_.is_file(path("a/latest")));
  EXPECT_TRUE(storage_.is_directory(path("a/tag")));
  EXPECT_EQ(read_small_file(storage_, path("a/tag/two"), 10), "2");
  EXPECT_FALSE(storage_.is_file(path("a/tag/three")));
  EXPECT_FALSE(storage_.is_file(path("b/tag/one")));  // the others stay as they are
  EXPECT_EQ(storage_.list(path("b")).size(), 2U);
}

TEST_F(OverlayTest, WhatLiesTwiceMustBeEqual) {
  write("b/tag/one", "1");
  storage_.lay_over(path("a"), {path("b")});
  EXPECT_EQ(storage_.list(path("a/tag")).size(), 2U);
  write("c/tag", "");
  write("b/tag/two", "2");
  write("a/tag/two", "3");
  EXPECT_THROW(storage_.list(path("a/tag")), Error);
}

TEST_F(OverlayTest, AFolderThatIsNotThereIsRefused) {
  EXPECT_THROW(storage_.lay_over(path("a"), {path("none")}), Error);
}

TEST(ShallowJson, RefusesWhatNobodyMeans) {
  EXPECT_EQ(parse_shallow_json(R"({"a": [1, {"a": 2}]})", "f")["a"][0], 1);
  for (const std::string& text :
       {std::string(R"({"a": 1, "a": 2})"), std::string(R"([{"b": 1, "b": 1}])"), std::string("{"),
        std::string(), std::string(200'000, '['), std::string(80, '[') + std::string(80, ']')})
    EXPECT_THROW(parse_shallow_json(text, "f"), Error) << text.substr(0, 20);
}

}  // namespace
}  // namespace isoshard::checkpoint
