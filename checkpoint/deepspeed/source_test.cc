// Facts about what a SOURCE argument means. Files are empty: nothing here opens a checkpoint.
#include "checkpoint/deepspeed/source.h"

#include <gtest/gtest.h>

#include "checkpoint/memory_storage.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

using Kind = SourcePlace::Kind;

class SourceTest : public testing::Test {
 protected:
  void write(const std::string& path, const std::string& text = "") {
    storage_.make_directories(parent_folder(path));
    storage_.create(path)->write_at(0, std::as_bytes(std::span(text)));
  }
  void write_tag(const std::string& folder) { write(folder + "/mp_rank_00_model_states.pt"); }
  void write_universal(const std::string& folder) { write(folder + "/zero/a.weight/fp32.pt"); }

  SourcePlace resolve(const std::string& path, const std::string& tag = "") {
    return resolve_source(storage_, path, tag);
  }
  ErrorInfo refusal(const std::string& path, const std::string& tag = "") {
    try {
      resolve(path, tag);
    } catch (const Error& error) {
      return error.info();
    }
    ADD_FAILURE() << "accepted";
    return {};
  }

  MemoryStorage storage_;
};

TEST_F(SourceTest, ASaveFolderIsFollowedByItsLatest) {
  write_tag("/run/global_step3");
  write("/run/latest", "global_step3");
  const SourcePlace place = resolve("/run");
  EXPECT_EQ(place.kind, Kind::kZero);
  EXPECT_EQ(place.folder, "/run/global_step3");
  EXPECT_EQ(place.save_folder, "/run");
  EXPECT_EQ(place.tag, "global_step3");
  EXPECT_TRUE(place.notices.empty());
}

TEST_F(SourceTest, WhiteSpaceAroundALatestIsIgnored) {
  write_tag("/run/global_step3");
  write("/run/latest", " \t\nglobal_step3\r\n\n");
  EXPECT_EQ(resolve("/run").tag, "global_step3");
}

TEST_F(SourceTest, WhiteSpaceInsideATagIsPartOfIt) {
  write_tag("/run/my tag");
  write("/run/latest", "my tag\n");
  EXPECT_EQ(resolve("/run").folder, "/run/my tag");
}

TEST_F(SourceTest, AnEmptyLatestIsIncompleteAndTheTagsAreListed) {
  write_tag("/run/global_step3");
  write_tag("/run/global_step6");
  storage_.make_directories("/run/other");
  for (const char* text : {"", "\n", "  \r\n"}) {
    write("/run/latest", text);
    const ErrorInfo info = refusal("/run");
    EXPECT_EQ(info.code, ErrorCode::kIncomplete);
    EXPECT_NE(info.next.find("\"global_step3\", \"global_step6\""), std::string::npos) << info.next;
    EXPECT_EQ(info.next.find("other"), std::string::npos);
    storage_.remove_file("/run/latest");
  }
}

TEST_F(SourceTest, ADanglingLatestIsNotFoundAndTheTagsAreListed) {
  write_tag("/run/global_step3");
  write("/run/latest", "global_step9");
  const ErrorInfo info = refusal("/run");
  EXPECT_EQ(info.code, ErrorCode::kNotFound);
  EXPECT_EQ(info.file, "/run/global_step9");
  EXPECT_NE(info.next.find("\"global_step3\""), std::string::npos) << info.next;
}

TEST_F(SourceTest, ALatestThatLeavesTheFolderIsHostile) {
  write_tag("/other/global_step3");
  storage_.make_directories("/run");
  for (const char* text : {"../other/global_step3", "/other/global_step3", "..", ".", "a/../..",
                           "global_step3\nglobal_step4", "a\x1b[31m", "\xFF"}) {
    write("/run/latest", text);
    EXPECT_EQ(refusal("/run").code, ErrorCode::kHostile) << text;
    storage_.remove_file("/run/latest");
  }
}

TEST_F(SourceTest, ALatestOfMegabytesIsALimit) {
  write("/run/latest", std::string(5000, 'x'));
  EXPECT_EQ(refusal("/run").code, ErrorCode::kLimit);
}

TEST_F(SourceTest, LatestGoesBeforeLatestUniversalWithANotice) {
  write_tag("/run/global_step3");
  write_universal("/run/global_step3_universal");
  write("/run/latest", "global_step3");
  write("/run/latest_universal", "global_step3_universal");
  const SourcePlace place = resolve("/run");
  EXPECT_EQ(place.kind, Kind::kZero);
  EXPECT_EQ(place.tag, "global_step3");
  EXPECT_EQ(place.notices.size(), 1u);
  EXPECT_EQ(resolve("/run", "global_step3_universal").kind, Kind::kUniversal);
}

TEST_F(SourceTest, LatestUniversalAloneIsFollowed) {
  write_universal("/run/global_step3_universal");
  write("/run/latest_universal", "global_step3_universal");
  const SourcePlace place = resolve("/run");
  EXPECT_EQ(place.kind, Kind::kUniversal);
  EXPECT_EQ(place.folder, "/run/global_step3_universal");
}

TEST_F(SourceTest, LatestMayNameAUniversalFolder) {
  write_universal("/run/u");
  write("/run/latest", "u");
  EXPECT_EQ(resolve("/run").kind, Kind::kUniversal);
}

TEST_F(SourceTest, ATagOnTheCommandLineGoesBeforeLatest) {
  write_tag("/run/global_step3");
  write_tag("/run/global_step6");
  write("/run/latest", "global_step6");
  EXPECT_EQ(resolve("/run", "global_step3").folder, "/run/global_step3");
  EXPECT_EQ(refusal("/run", "nothing").code, ErrorCode::kNotFound);
  EXPECT_EQ(refusal("/run", "../run").code, ErrorCode::kHostile);
}

TEST_F(SourceTest, ATagFolderIsTakenAsItIs) {
  write_tag("/run/global_step3");
  for (const char* path : {"/run/global_step3", "/run/global_step3/"}) {
    const SourcePlace place = resolve(path);
    EXPECT_EQ(place.kind, Kind::kZero);
    EXPECT_EQ(place.tag, "global_step3");
    EXPECT_EQ(place.save_folder, "");
  }
}

TEST_F(SourceTest, AFolderThatHoldsZeroIsUniversal) {
  write_universal("/u");
  const SourcePlace place = resolve("/u");
  EXPECT_EQ(place.kind, Kind::kUniversal);
  EXPECT_EQ(place.tag, "u");
}

TEST_F(SourceTest, AFileNamedZeroDoesNotMakeAFolderUniversal) {
  write("/run/zero");
  EXPECT_EQ(refusal("/run").code, ErrorCode::kNotFound);
}

TEST_F(SourceTest, ATrainerFolderIsReadThroughItsLatestNotItsWeights) {
  write_tag("/out/checkpoint-30/global_step30");
  write("/out/checkpoint-30/latest", "global_step30");
  write("/out/checkpoint-30/model.safetensors");
  write("/out/checkpoint-30/trainer_state.json");
  const SourcePlace place = resolve("/out/checkpoint-30");
  EXPECT_EQ(place.kind, Kind::kZero);
  EXPECT_EQ(place.folder, "/out/checkpoint-30/global_step30");
}

TEST_F(SourceTest, AFileIsWeights) {
  write("/w/model.safetensors");
  const SourcePlace place = resolve("/w/model.safetensors");
  EXPECT_EQ(place.kind, Kind::kWeights);
  EXPECT_EQ(place.folder, "/w");
  EXPECT_EQ(place.files, (std::vector<std::string>{"model.safetensors"}));
}

TEST_F(SourceTest, AFolderOfWeightsHoldsItsShardsInOrder) {
  write("/w/pytorch_model-00002-of-00002.bin");
  write("/w/pytorch_model-00001-of-00002.bin");
  write("/w/pytorch_model.bin.index.json");
  write("/w/config.json");
  const SourcePlace place = resolve("/w");
  EXPECT_EQ(place.kind, Kind::kWeights);
  EXPECT_EQ(place.files, (std::vector<std::string>{"pytorch_model-00001-of-00002.bin",
                                                   "pytorch_model-00002-of-00002.bin"}));
  EXPECT_TRUE(place.notices.empty());
}

TEST_F(SourceTest, SafetensorsGoBeforeBinWithANotice) {
  write("/w/model.safetensors");
  write("/w/pytorch_model.bin");
  const SourcePlace place = resolve("/w");
  EXPECT_EQ(place.files, (std::vector<std::string>{"model.safetensors"}));
  EXPECT_EQ(place.notices.size(), 1u);
}

TEST_F(SourceTest, WhatIsNoCheckpointIsNotFound) {
  storage_.make_directories("/empty");
  write("/text/readme.txt");
  write_tag("/runs/a/global_step1");
  EXPECT_EQ(refusal("/none").code, ErrorCode::kNotFound);
  EXPECT_EQ(refusal("/empty").code, ErrorCode::kNotFound);
  EXPECT_EQ(refusal("/text").code, ErrorCode::kNotFound);
  EXPECT_NE(refusal("/runs/a").next.find("\"global_step1\""), std::string::npos);
}

TEST(Path, PartsOfPaths) {
  EXPECT_EQ(join("a", "b"), "a/b");
  EXPECT_EQ(join("a/", "b"), "a/b");
  EXPECT_EQ(join(".", "b"), "b");
  EXPECT_EQ(join("", "b"), "b");
  EXPECT_EQ(base_name("a/b/"), "b");
  EXPECT_EQ(base_name("b"), "b");
  EXPECT_EQ(parent_folder("a/b//"), "a");
  EXPECT_EQ(parent_folder("/a"), "/");
  EXPECT_EQ(parent_folder("a"), ".");
}

}  // namespace
}  // namespace isoshard::checkpoint
