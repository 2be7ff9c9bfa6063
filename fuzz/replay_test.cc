// Every seed and every file that was once a finding goes through its target, in any build.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "checkpoint/shallow_json.h"
#include "fuzz/targets.h"

namespace isoshard::fuzz {
namespace {

namespace fs = std::filesystem;

const fs::path kFolder = ISOSHARD_FUZZ_FOLDER;
constexpr double kMostSeconds = 10;  // with sanitizers, on a machine that does other things too

std::vector<fs::path> files_in(const fs::path& folder) {
  std::vector<fs::path> files;
  if (!fs::is_directory(folder)) return files;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder))
    files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  return files;
}

void run_in_time(const Target& target, const std::string& text) {
  const auto started = std::chrono::steady_clock::now();
  EXPECT_NO_THROW(target.run_one(bytes_of(text)));
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - started;
  EXPECT_LT(taken.count(), kMostSeconds);
}

void replay(const Target& target, const fs::path& path) {
  SCOPED_TRACE(path.string());
  std::ifstream file(path, std::ios::binary);
  run_in_time(target, std::string(std::istreambuf_iterator<char>(file), {}));
}

class Replay : public testing::TestWithParam<Target> {};

TEST_P(Replay, EveryFileIsReadOrRefused) {
  const std::vector<fs::path> seeds = files_in(kFolder / "corpus" / GetParam().name);
  EXPECT_FALSE(seeds.empty()) << "fuzz/make_seeds.py makes them";
  for (const fs::path& path : seeds) replay(GetParam(), path);
  for (const fs::path& path : files_in(kFolder / "regressions" / GetParam().name))
    replay(GetParam(), path);
}

TEST_P(Replay, NothingAtAllIsRefused) { EXPECT_NO_THROW(GetParam().run_one({})); }

INSTANTIATE_TEST_SUITE_P(Fuzz, Replay, testing::ValuesIn(targets()),
                         [](const auto& info) { return info.param.name; });

// What is too large to be committed: each took minutes, or all of the stack, once.
TEST(LargeInput, TwoHundredThousandObjectsAreReadInProportion) {
  std::string text = "[";
  while (text.size() < 600'000) text += "{},";
  text += "{}]";
  run_in_time({"shallow_json", shallow_json::run_one}, text);
  run_in_time({"manifest", manifest::run_one}, "{\"files\":" + text + "}");
}

TEST(LargeInput, AMillionListsWithinEachOtherAreRefused) {
  const std::string text = std::string(1'000'000, '[') + std::string(1'000'000, ']');
  run_in_time({"shallow_json", shallow_json::run_one}, text);
  run_in_time({"manifest", manifest::run_one}, text);
}

// 100,000 tensors, as the index of a model with 10^12 parameters has them: some 15 MB.
TEST(LargeInput, TheIndexOfALargeModelIsRead) {
  std::string text = "{\"metadata\": {\"total_size\": 2000000000000}, \"weight_map\": {";
  for (int i = 0; i < 100'000; ++i) {
    text += i == 0 ? "\n" : ",\n";
    text += "    \"model.layers." + std::to_string(i / 1000) + ".mlp.experts." +
            std::to_string(i % 1000) +
            ".gate_up_projection_with_a_long_name.weight_packed_and_scaled\": "
            "\"model-00001-of-00999.safetensors\"";
  }
  EXPECT_EQ(checkpoint::read_shallow_json(text + "}}").why, "");
}

TEST(ReplayFolders, BelongToTargets) {
  for (const char* kind : {"corpus", "regressions"}) {
    for (const fs::path& folder : files_in(kFolder / kind)) {
      const std::string name = folder.filename().string();
      const std::vector<Target> all = targets();
      EXPECT_TRUE(std::ranges::any_of(all, [&](const Target& t) { return t.name == name; }))
          << folder;
    }
  }
}

}  // namespace
}  // namespace isoshard::fuzz
