// Verdicts on the real checkpoints in traces/, whole and damaged. Folders are copied into memory;
// nothing on the disk is touched.
#include "reshard/verify.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "checkpoint/deepspeed/source.h"
#include "checkpoint/deepspeed/universal_blueprint.h"
#include "checkpoint/deepspeed/weights_blueprint.h"
#include "checkpoint/format/crc.h"
#include "checkpoint/format/pickle_writer.h"
#include "checkpoint/format/zip.h"
#include "checkpoint/manifest.h"
#include "checkpoint/memory_storage.h"
#include "checkpoint/object_store_case.h"
#include "core/error.h"
#include "core/random.h"
#include "reshard/convert.h"
#include "reshard/plan.h"

namespace isoshard::reshard {
namespace {

using checkpoint::MemoryStorage;
namespace fs = std::filesystem;

const fs::path kTraces = fs::path(ISOSHARD_TRACES) / "deepspeed";
const std::string kModelFile = "mp_rank_00_model_states.pt";
const std::string kRank1File = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt";

void put(Storage& storage, const std::string& path, const std::string& text) {
  if (storage.is_file(path)) storage.remove_file(path);
  const std::unique_ptr<WritableFile> file = storage.create(path);
  file->write_at(0, std::as_bytes(std::span(text)));
  file->close();
}

std::string get(Storage& storage, const std::string& path) {
  return read_small_file(storage, path, 1 << 28);
}

// Copies a folder from the disk to `target` in memory.
void load(Storage& storage, const fs::path& source, const std::string& target) {
  storage.make_directories(target);
  for (const fs::directory_entry& entry : fs::recursive_directory_iterator(source)) {
    const std::string path = target + "/" + entry.path().lexically_relative(source).string();
    if (entry.is_directory()) {
      storage.make_directories(path);
      continue;
    }
    std::ifstream file(entry.path(), std::ios::binary);
    put(storage, path, std::string(std::istreambuf_iterator<char>(file), {}));
  }
}

Verification verdict_on(Storage& storage, const std::string& path) {
  return verify(storage, path, {});
}

std::string findings_of(const Verification& v) {
  std::string text;
  for (const Finding& finding : v.findings) text += finding.text + "\n";
  return text;
}

// The ZeRO-1 checkpoint of two ranks that most tests damage, at /save/global_step3.
class Verify : public testing::Test {
 protected:
  static constexpr const char* kTag = "/save/global_step3";

  void SetUp() override { load(storage_, kTraces / "z1_bf16_dp2" / "ckpt", "/save"); }

  void expect(Verdict verdict, const std::string& word, const std::string& path = "/save") {
    const Verification v = verdict_on(storage_, path);
    EXPECT_EQ(name(v.verdict), std::string(name(verdict))) << findings_of(v);
    EXPECT_NE(findings_of(v).find(word), std::string::npos) << findings_of(v);
  }

  // Converts the checkpoint to a universal folder of ours.
  void convert_to(const std::string& target) {
    const checkpoint::ShardedState state = checkpoint::read_checkpoint(storage_, "/save", {});
    ConvertOptions options;
    options.target = target;
    options.certificate = {{"program", "isoshard test"}};
    convert(storage_, state, make_plan(state, checkpoint::universal_blueprints(state, {}).files),
            options);
  }

  // A manifest of the tag folder as it is, in which the hashes of some files are wrong.
  void add_manifest(const std::vector<std::string>& wrong) {
    checkpoint::Manifest manifest{.files = {}, .program_version = "isoshard test"};
    for (const DirectoryEntry& entry : storage_.list(kTag)) {
      const bool is_wrong = std::ranges::count(wrong, entry.name) > 0;
      const std::string hash =
          checkpoint::sha256_hex(is_wrong ? "other" : get(storage_, kTag + ("/" + entry.name)));
      manifest.files.push_back({entry.name, entry.size_bytes, "sha256:" + hash});
    }
    put(storage_, std::string(kTag) + "/MANIFEST.json", to_json(manifest));
  }

  MemoryStorage storage_;
};

TEST(VerifyTraces, EveryRealCheckpointIsCompleteButTheSwappedOnes) {
  int seen = 0;
  for (const fs::directory_entry& trace : fs::directory_iterator(kTraces)) {
    for (const char* form : {"ckpt", "universal", "fp32"}) {
      if (!fs::is_directory(trace.path() / form)) continue;
      MemoryStorage storage;
      load(storage, trace.path() / form, "/save");
      const Verification v = verdict_on(storage, "/save");
      const bool round_robin = trace.path().filename().string().find("_rr_") != std::string::npos;
      const bool swapped = round_robin && form == std::string("universal");
      EXPECT_EQ(v.verdict, swapped ? Verdict::kSuspect : Verdict::kComplete)
          << trace.path() << " " << form << " " << findings_of(v);
      EXPECT_TRUE(v.read_whole);
      ++seen;
    }
  }
  EXPECT_GE(seen, 40);
}

TEST(VerifyTraces, MastersThatDeepSpeedsConverterSwappedAreNamed) {
  MemoryStorage storage;
  load(storage, kTraces / "z2_rr_dp3" / "universal", "/save");
  const Verification v = verdict_on(storage, "/save");
  EXPECT_NE(findings_of(v).find("in 12 of 13 parameters"), std::string::npos) << findings_of(v);
  EXPECT_EQ(v.copies.differences.size(), 12u);
  for (const CopyDifference& difference : v.copies.differences) {
    EXPECT_NE(difference.pair.name, "scale");  // the one parameter that stays in its place
  }
}

TEST_F(Verify, AnyFlippedByteIsFound) {
  Random random(20260101);
  for (const DirectoryEntry& entry : storage_.list(kTag)) {
    const std::string path = std::string(kTag) + "/" + entry.name;
    const std::string whole = get(storage_, path);
    for (int64_t at = random.below(61); at < entry.size_bytes; at += 61) {
      std::string damaged = whole;
      damaged[static_cast<size_t>(at)] ^= static_cast<char>(random.between(1, 255));
      put(storage_, path, damaged);
      const Verification v = verdict_on(storage_, "/save");
      ASSERT_GT(v.verdict, Verdict::kComplete) << path << " byte " << at;
      ASSERT_FALSE(v.findings.empty());
    }
    put(storage_, path, whole);
  }
}

TEST_F(Verify, AFlippedPayloadByteIsCorruptAndNamesFileAndRecord) {
  const std::string path = std::string(kTag) + "/" + kRank1File;
  std::string bytes = get(storage_, path);
  // The largest record is the partition of the masters.
  const auto file = storage_.open_read(path);
  const checkpoint::ZipIndex index = checkpoint::read_zip_index(*file);
  const auto largest =
      std::ranges::max_element(index.records, {}, [](const checkpoint::ZipRecord& record) {
        return record.name.ends_with(".pkl") ? 0 : record.size_bytes;
      });
  bytes[static_cast<size_t>(largest->data_offset)] ^= 1;
  put(storage_, path, bytes);
  expect(Verdict::kCorrupt, largest->name);
  expect(Verdict::kCorrupt, kRank1File);
}

TEST_F(Verify, AFileCutAnywhereIsWorseThanComplete) {
  const std::string path = std::string(kTag) + "/" + kRank1File;
  const std::string whole = get(storage_, path);
  for (size_t length = 0; length < whole.size(); length += 97) {
    put(storage_, path, whole.substr(0, length));
    ASSERT_GE(verdict_on(storage_, "/save").verdict, Verdict::kIncomplete) << length;
  }
  put(storage_, path, whole + '\0');
  ASSERT_GE(verdict_on(storage_, "/save").verdict, Verdict::kIncomplete);
}

TEST_F(Verify, AMissingShardIsIncompleteAndNamed) {
  storage_.remove_file(std::string(kTag) + "/" + kRank1File);
  expect(Verdict::kIncomplete, "rank 1");
}

TEST_F(Verify, AMissingModelFileIsIncomplete) {
  storage_.remove_file(std::string(kTag) + "/" + kModelFile);
  expect(Verdict::kIncomplete, "model file");
}

TEST_F(Verify, SwappedShardsAreCorrupt) {
  const std::string a = std::string(kTag) + "/" + kRank1File;
  const std::string b = std::string(kTag) + "/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt";
  const std::string rank1 = get(storage_, a);
  put(storage_, a, get(storage_, b));
  put(storage_, b, rank1);
  expect(Verdict::kCorrupt, "another name");
}

TEST_F(Verify, AShardOfALargerWorldIsCorrupt) {
  put(storage_, std::string(kTag) + "/bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt",
      get(storage_, std::string(kTag) + "/" + kRank1File));
  expect(Verdict::kCorrupt, "larger world");
}

TEST_F(Verify, PointersAreJudged) {
  put(storage_, "/save/latest", "");
  expect(Verdict::kIncomplete, "global_step3");
  put(storage_, "/save/latest", "global_step4");
  expect(Verdict::kIncomplete, "global_step4");
  put(storage_, "/save/latest", "../../etc");
  expect(Verdict::kHostile, "cannot be used");
}

TEST_F(Verify, APickleThatRunsAProgramIsHostile) {
  checkpoint::Pickle pickle;
  pickle.root = pickle.reduce("posix", "system", {pickle.string("true")});
  const std::string stem = kModelFile.substr(0, kModelFile.size() - 3);
  const std::string record = checkpoint::write_pickle(pickle);
  checkpoint::ZipLayout zip;
  zip.add(stem + "/data.pkl", static_cast<int64_t>(record.size()));
  const uint32_t crc = checkpoint::crc32_of(std::as_bytes(std::span(record)));
  put(storage_, std::string(kTag) + "/" + kModelFile,
      zip.header(0) + record + zip.descriptor(0, crc) + zip.directory({crc}));
  expect(Verdict::kHostile, "posix");
}

TEST_F(Verify, WhatIsNoCheckpointIsTheCallersMistake) {
  EXPECT_THROW(verdict_on(storage_, "/nothing"), Error);
  storage_.make_directories("/empty");
  EXPECT_THROW(verdict_on(storage_, "/empty"), Error);
  VerifyOptions options;
  options.read.tag = "global_step9";
  EXPECT_THROW(verify(storage_, "/save", options), Error);
}

TEST_F(Verify, WeightsLoadedWithoutTheirMastersAreSuspect) {
  const std::string path = std::string(kTag) + "/" + kModelFile;
  std::string bytes = get(storage_, path);
  const checkpoint::ShardedState state = checkpoint::read_checkpoint(storage_, "/save", {});
  const checkpoint::ParameterState& parameter = *state.find_parameter("head.weight");
  const checkpoint::FileFragment place = state.leaf(parameter.model_copy).fragments.front();
  bytes[static_cast<size_t>(place.offset_bytes) + 2] ^= 1;
  // The record's CRC is made right again, in its descriptor and in the directory.
  for (const checkpoint::ZipRecord& record : state.document(place.file).zip().records) {
    const int64_t at = place.offset_bytes - record.data_offset;
    if (at < 0 || at >= record.size_bytes) continue;
    const auto payload = std::string_view(bytes).substr(static_cast<size_t>(record.data_offset),
                                                        static_cast<size_t>(record.size_bytes));
    const uint32_t crc = checkpoint::crc32_of(std::as_bytes(std::span(payload)));
    const std::string before(reinterpret_cast<const char*>(&record.crc32), 4);
    for (size_t i = bytes.find(before); i != std::string::npos; i = bytes.find(before, i + 4)) {
      bytes.replace(i, 4, reinterpret_cast<const char*>(&crc), 4);
    }
  }
  put(storage_, path, bytes);
  expect(Verdict::kSuspect, "in 1 of 13 parameters");
  expect(Verdict::kSuspect, "\"head.weight\"[0, 1]: master");
}

TEST_F(Verify, OurOwnFolderIsVerified) {
  convert_to("/out");
  const Verification v = verdict_on(storage_, "/out");
  EXPECT_EQ(v.verdict, Verdict::kVerified) << findings_of(v);
  EXPECT_NE(v.certificate.find("computed again"), std::string::npos) << v.certificate;
}

TEST_F(Verify, OurOwnFolderWithoutItsManifestIsIncomplete) {
  convert_to("/out");
  storage_.remove_file("/out/MANIFEST.json");
  expect(Verdict::kIncomplete, "MANIFEST.json", "/out");
}

TEST_F(Verify, ATamperedManifestIsCorrupt) {
  convert_to("/out");
  std::string text = get(storage_, "/out/MANIFEST.json");
  const size_t digit = text.find("crc64x2:") + 8;
  text[digit] = text[digit] == '0' ? '1' : '0';
  put(storage_, "/out/MANIFEST.json", text);
  expect(Verdict::kCorrupt, "MANIFEST.json", "/out");
}

TEST_F(Verify, AnyFlippedByteOfOurOwnFolderIsFound) {
  convert_to("/out");
  Random random(4);
  std::vector<std::string> folders = {"/out"};
  while (!folders.empty()) {
    const std::string folder = std::move(folders.back());
    folders.pop_back();
    for (const DirectoryEntry& entry : storage_.list(folder)) {
      const std::string path = folder + "/" + entry.name;
      if (entry.kind == DirectoryEntry::Kind::kDirectory) {
        folders.push_back(path);
        continue;
      }
      const std::string whole = get(storage_, path);
      std::string damaged = whole;
      damaged[static_cast<size_t>(random.below(entry.size_bytes))] ^= 0x20;
      put(storage_, path, damaged);
      ASSERT_GE(verdict_on(storage_, "/out").verdict, Verdict::kCorrupt) << path;
      put(storage_, path, whole);
    }
  }
}

TEST_F(Verify, AMissingListedFileIsIncompleteAndAnUnlistedOneSuspect) {
  convert_to("/out");
  put(storage_, "/out/zero/notes.txt", "hello");
  expect(Verdict::kSuspect, "zero/notes.txt", "/out");
  storage_.remove_file("/out/zero/scale/exp_avg.pt");
  expect(Verdict::kIncomplete, "zero/scale/exp_avg.pt", "/out");
  expect(Verdict::kIncomplete, "in the manifest missing", "/out");
}

// isoshard goes on without them; DeepSpeed cannot.
TEST_F(Verify, MissingModelFilesOfStage3AreIncomplete) {
  load(storage_, kTraces / "z3_bf16_dp3" / "ckpt", "/three");
  EXPECT_EQ(name(verdict_on(storage_, "/three").verdict), std::string("COMPLETE"));
  storage_.remove_file("/three/global_step3/zero_pp_rank_1_mp_rank_00_model_states.pt");
  expect(Verdict::kIncomplete, "which DeepSpeed needs to resume", "/three");
}

TEST_F(Verify, ATensorThatChangedUnderARightCrcIsFoundByTheManifest) {
  convert_to("/out");
  put(storage_, "/out/zero/blocks.0.up.weight/exp_avg.pt",
      get(storage_, "/out/zero/blocks.1.up.weight/exp_avg.pt"));
  expect(Verdict::kCorrupt, "1 file of the", "/out");
}

TEST_F(Verify, ACertificateOfOtherDigestsIsCorruptEvenUnderAManifestThatFits) {
  convert_to("/out");
  std::string certificate = get(storage_, "/out/certificate.json");
  const size_t digit = certificate.rfind("iso1:") + 5;
  certificate[digit] = certificate[digit] == '0' ? '1' : '0';
  put(storage_, "/out/certificate.json", certificate);
  checkpoint::Manifest manifest =
      checkpoint::parse_manifest(get(storage_, "/out/MANIFEST.json"), "/out/MANIFEST.json");
  for (checkpoint::ManifestFile& file : manifest.files) {
    if (file.path != "certificate.json") continue;
    file.hash = "sha256:" + checkpoint::sha256_hex(certificate);
  }
  put(storage_, "/out/MANIFEST.json", to_json(manifest));
  expect(Verdict::kCorrupt, "certificate", "/out");
}

TEST_F(Verify, AManifestOfAnEarlierSaveIsSetAside) {
  add_manifest({kModelFile, kRank1File, "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"});
  const Verification v = verdict_on(storage_, "/save");
  EXPECT_EQ(v.verdict, Verdict::kComplete) << findings_of(v);
  EXPECT_NE(v.manifest.find("earlier save"), std::string::npos);
}

TEST_F(Verify, AManifestThatFitsSomeFilesOnlyIsCorrupt) {
  add_manifest({});
  EXPECT_EQ(verdict_on(storage_, "/save").verdict, Verdict::kVerified);
  storage_.remove_file(std::string(kTag) + "/MANIFEST.json");
  add_manifest({kRank1File});
  expect(Verdict::kCorrupt, kRank1File);
}

TEST_F(Verify, MissingPartsOfWeightsAreIncomplete) {
  const checkpoint::ShardedState state = checkpoint::read_checkpoint(storage_, "/save", {});
  ConvertOptions options;
  options.target = "/out";
  options.certificate = {{"program", "isoshard test"}};
  convert(storage_, state,
          make_plan(state, checkpoint::weights_blueprints(state, {.max_shard_bytes = 1000}).files),
          options);
  EXPECT_EQ(verdict_on(storage_, "/out").verdict, Verdict::kVerified);
  storage_.remove_file("/out/MANIFEST.json");
  storage_.remove_file("/out/certificate.json");
  EXPECT_EQ(verdict_on(storage_, "/out").verdict, Verdict::kComplete);
  const std::string index = get(storage_, "/out/model.safetensors.index.json");
  nlohmann::json more = nlohmann::json::parse(index);
  more["weight_map"]["lost.weight"] = "model-00001-of-00002.safetensors";
  put(storage_, "/out/model.safetensors.index.json", more.dump());
  expect(Verdict::kIncomplete, "tensor \"lost.weight\"", "/out");
  put(storage_, "/out/model.safetensors.index.json", index);
  for (const DirectoryEntry& entry : storage_.list("/out")) {
    if (entry.name.starts_with("model-00002")) storage_.remove_file("/out/" + entry.name);
  }
  expect(Verdict::kIncomplete, "model-00002-of-", "/out");
  storage_.remove_file("/out/model.safetensors.index.json");
  expect(Verdict::kIncomplete, "model-00002-of-", "/out");
}

TEST_F(Verify, WeightsOfOursHaveTheSourcesWeightsAndBuffers) {
  const checkpoint::ShardedState state = checkpoint::read_checkpoint(storage_, "/save", {});
  ConvertOptions options;
  options.target = "/out";
  options.certificate = {{"program", "isoshard test"}, {"buffers", {"count", "running"}}};
  const ConvertResult result = convert(
      storage_, state, make_plan(state, checkpoint::weights_blueprints(state, {}).files), options);
  const Verification v = verdict_on(storage_, "/out");
  EXPECT_EQ(v.verdict, Verdict::kVerified) << findings_of(v);
  ASSERT_TRUE(v.digest);
  for (const char* section : {"weights", "buffers"}) {
    const SectionDigest* source = find_section(result.source, section);
    ASSERT_NE(source, nullptr);
    EXPECT_EQ(find_section(*v.digest, section)->hex, source->hex) << section;
    EXPECT_EQ(find_section(result.target, section)->hex, source->hex) << section;
  }
}

// Nothing is renamed there, so that the folder is seen while it grows.
TEST(VerifyObjectStore, AFolderIsUnfinishedUntilItsManifestIsThere) {
  for (const std::string end : {"", "model.safetensors", "certificate.json", "MANIFEST.json"}) {
    checkpoint::ObjectStore storage;
    load(storage, kTraces / "z1_bf16_dp2" / "ckpt", "/save");
    storage.ends_at = end;
    const checkpoint::ShardedState state = checkpoint::read_checkpoint(storage, "/save", {});
    ConvertOptions options;
    options.target = "/out";
    options.certificate = {{"program", "isoshard test"}};
    const ReshardPlan plan = make_plan(state, checkpoint::weights_blueprints(state, {}).files);
    if (!end.empty()) {
      EXPECT_THROW(convert(storage, state, plan, options), Error);
    } else {
      convert(storage, state, plan, options);
    }
    EXPECT_EQ(verdict_on(storage, "/out").verdict,
              end.empty() ? Verdict::kVerified : Verdict::kIncomplete)
        << end;
  }
}

}  // namespace
}  // namespace isoshard::reshard
