// What the files of one save say twice must agree: recorded files are changed in one number, with
// every CRC put right, and refused by that number's name. Folders are copied into memory.
#include <gtest/gtest.h>

#include <bit>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>

#include "checkpoint/deepspeed/reader.h"
#include "checkpoint/format/crc.h"
#include "checkpoint/format/zip.h"
#include "checkpoint/memory_storage.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

namespace fs = std::filesystem;
using namespace std::string_literals;

std::string little(uint32_t value) {
  std::string text;
  for (int i = 0; i < 4; ++i, value >>= 8) text += static_cast<char>(value & 0xFF);
  return text;
}

uint32_t crc_of(const std::string& text) { return crc32_of(std::as_bytes(std::span(text))); }

class ReaderChecks : public testing::Test {
 protected:
  static constexpr const char* kTag = "/save/global_step3/";

  void load(const std::string& trace) {
    const fs::path source = fs::path(ISOSHARD_TRACES) / "deepspeed" / trace / "ckpt";
    storage_.make_directories(kTag);
    for (const fs::directory_entry& entry : fs::recursive_directory_iterator(source)) {
      if (!entry.is_regular_file()) continue;
      std::ifstream file(entry.path(), std::ios::binary);
      put("/save/" + entry.path().lexically_relative(source).string(),
          std::string(std::istreambuf_iterator<char>(file), {}));
    }
  }

  void put(const std::string& path, const std::string& text) {
    if (storage_.is_file(path)) storage_.remove_file(path);
    const auto file = storage_.create(path);
    file->write_at(0, std::as_bytes(std::span(text)));
    file->close();
  }

  std::string get(const std::string& path) { return read_small_file(storage_, path, 1 << 28); }

  // Changes the bytes of a record of one of the tag's files, but not their number.
  void change(const std::string& name, const std::string& record_name,
              const std::function<void(std::string*)>& work) {
    std::string text = get(kTag + name);
    const ZipIndex index = read_zip_index(*storage_.open_read(kTag + name));
    for (const ZipRecord& record : index.records) {
      if (record.name != record_name) continue;
      const auto at = static_cast<size_t>(record.data_offset);
      std::string bytes = text.substr(at, static_cast<size_t>(record.size_bytes));
      work(&bytes);
      ASSERT_NE(crc_of(bytes), record.crc32) << "nothing was changed";
      text.replace(at, bytes.size(), bytes);
      int places = 0;  // the descriptor and the directory
      const std::string old = little(record.crc32), crc = little(crc_of(bytes));
      for (size_t found = text.find(old); found != std::string::npos; found = text.find(old)) {
        text.replace(found, 4, crc);
        ++places;
      }
      ASSERT_EQ(places, 2) << record_name;
      return put(kTag + name, text);
    }
    FAIL() << "no record " << record_name;
  }

  // The first `from` behind a key of the pickle becomes `to`.
  void replace(const std::string& name, const std::string& key, const std::string& from,
               const std::string& to) {
    change(name, "data.pkl", [&](std::string* bytes) {
      const size_t at = bytes->find(from, bytes->find(key));
      ASSERT_NE(at, std::string::npos) << key;
      bytes->replace(at, from.size(), to);
    });
  }

  // The first flat tensor behind a key becomes an element shorter.
  void shorten(const std::string& name, const std::string& key) {
    change(name, "data.pkl", [&](std::string* bytes) {
      const size_t end = bytes->find("\x85q", bytes->find(key));  // behind its one size
      ASSERT_NE(end, std::string::npos) << key;
      const bool short_size = (*bytes)[end - 2] == 'K';
      ASSERT_TRUE(short_size || (*bytes)[end - 3] == 'M');
      --(*bytes)[end - (short_size ? 1 : 2)];
    });
  }

  std::string refusal() {
    try {
      read_checkpoint(storage_, "/save", {});
    } catch (const Error& error) {
      return error.info().what;
    }
    return "nothing was refused";
  }

  MemoryStorage storage_;
};

const std::string kRank0 = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt";
const std::string kRank1 = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt";

TEST_F(ReaderChecks, ThePaddingIsThatOfTheShapes) {
  load("z1_bf16_dp2");
  replace(kRank0, "group_paddings", "K\0a"s, "K\1a");
  EXPECT_EQ(refusal(), "The padding of a partition is not what the parameter shapes call for.");
}

TEST_F(ReaderChecks, ThePartitionCountIsThatOfTheFiles) {
  load("z1_bf16_dp2");
  replace(kRank0, "partition_count", "K\2a", "K\3a");
  EXPECT_EQ(refusal(), "A group's partition count differs from the number of files.");
}

TEST_F(ReaderChecks, SlicesAreWhereTheShapesPutThem) {
  load("z1_bf16_dp2");
  replace(kRank0, "start", "K\x00u"s, "K\x01u");
  EXPECT_EQ(refusal(), "A parameter's slice is not where the shapes put it.");
}

TEST_F(ReaderChecks, APartitionHasTheLengthOfItsShapes) {
  load("z1_bf16_dp2");
  shorten(kRank0, "single_partition_of_fp32_groups");
  EXPECT_EQ(refusal(), "A partition has the wrong length.");
}

TEST_F(ReaderChecks, AFlatBufferOfStage3HasTheLengthOfItsSlots) {
  load("z3_bf16_dp3");
  shorten(kRank0, "fp32_flat_groups");
  EXPECT_EQ(refusal(), "A partition has the wrong length.");
}

TEST_F(ReaderChecks, AFrozenFragmentHasTheLengthOfItsSlot) {
  load("z3_bf16_dp2_frozen");
  shorten("zero_pp_rank_1_mp_rank_00_model_states.pt", "frozen_param_fragments");
  EXPECT_EQ(refusal(), "A frozen fragment has the wrong length.");
}

TEST_F(ReaderChecks, RanksStandAtOneStep) {
  load("z1_bf16_dp2");
  change(kRank1, "data/0", [](std::string* bytes) {
    ASSERT_EQ(*bytes, little(std::bit_cast<uint32_t>(3.0f)));
    *bytes = little(std::bit_cast<uint32_t>(4.0f));
  });
  EXPECT_EQ(refusal(), "Ranks stand at different steps: files of two saves are mixed.");
}

TEST_F(ReaderChecks, AStepsCrcIsCompared) {
  load("z1_bf16_dp2");
  std::string text = get(kTag + kRank1);
  for (const ZipRecord& record : read_zip_index(*storage_.open_read(kTag + kRank1)).records) {
    if (record.name == "data/0") text[static_cast<size_t>(record.data_offset)] ^= 1;
  }
  put(kTag + kRank1, text);
  EXPECT_EQ(refusal(), "A record's bytes do not fit its CRC.");
}

TEST_F(ReaderChecks, ARankHasOneFile) {
  load("z1_bf16_dp2");
  put(kTag + kRank0.substr(5), get(kTag + kRank0));  // without bf16_
  EXPECT_EQ(refusal(), "Two files stand for the same rank; one is left over from another save.");
}

}  // namespace
}  // namespace isoshard::checkpoint
