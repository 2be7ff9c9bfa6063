// Damage to real DeepSpeed files, byte by byte: every case must end in isoshard::Error, or give the
// very digest of the undamaged checkpoint ("proven equal"; such bytes are printed). A CheckFailure,
// another exception or another digest fails the test. All files are whole-file leaves, too, so that
// every record's CRC is checked: what `verify` reads, not only what `digest` needs.
//
// Not verified: damage to safetensors, which has no checksums; damage that also repairs every CRC.
//
// ISOSHARD_TRACES: folder with the recorded checkpoints (default: what CMake says). ISOSHARD_CASES:
// a sanitizer build runs so many cases a test (default 300, at most 1,000), evenly spread. Any
// other build turns over each byte outside payloads, and one bit of it; from 10,000 on (nightly) it
// flips every single bit, too, and no payload byte is left out.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>

#include "checkpoint/deepspeed/reader.h"
#include "checkpoint/format/crc.h"
#include "checkpoint/format/torch_file.h"
#include "checkpoint/memory_storage.h"
#include "core/check.h"
#include "core/error.h"
#include "core/random.h"
#include "reshard/digest.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define ISOSHARD_SANITIZED 1
#else
#define ISOSHARD_SANITIZED 0
#endif

namespace isoshard {
namespace {

namespace fs = std::filesystem;
using checkpoint::MemoryStorage;

fs::path traces() {
  const char* named = std::getenv("ISOSHARD_TRACES");
  return fs::path(named != nullptr ? named : ISOSHARD_TRACES) / "deepspeed";
}

int64_t asked_cases() {
  const char* asked = std::getenv("ISOSHARD_CASES");
  return asked != nullptr ? std::atoll(asked) : 300;
}
int64_t most_cases() {
  return ISOSHARD_SANITIZED ? std::clamp<int64_t>(asked_cases(), 1, 1000) : INT64_MAX;
}
bool is_nightly() { return !ISOSHARD_SANITIZED && asked_cases() >= 10'000; }

// A recorded checkpoint in memory, and what one damaged copy of it does.
class Patient {
 public:
  explicit Patient(const std::string& recording) {
    const fs::path folder = traces() / recording;
    if (!fs::exists(folder)) return;
    for (const fs::directory_entry& entry : fs::recursive_directory_iterator(folder)) {
      if (!entry.is_regular_file()) continue;
      std::ifstream stream(entry.path(), std::ios::binary);
      const std::string bytes{std::istreambuf_iterator<char>(stream), {}};
      const std::string path = "/source/" + fs::relative(entry.path(), folder).string();
      files_[path] = bytes;
      put(path, bytes);
    }
    healthy_ = examine();
    EXPECT_EQ(healthy_.substr(0, 5), "iso1:") << healthy_;
  }

  const std::map<std::string, std::string>& files() const { return files_; }

  // How many cases gave neither an Error nor the healthy digest.
  size_t silent() const { return silent_.size(); }

  // Replaces the file for one case. Returns false when a case was silent.
  bool survives(const std::string& path, const std::string& bytes, const std::string& what) {
    put(path, bytes);
    judge(what);
    put(path, files_.at(path));
    return silent_.empty();
  }

  // The same for one byte, without a copy of the file.
  bool survives_flip(const std::string& path, int64_t offset, unsigned char mask) {
    const char original = files_.at(path)[static_cast<size_t>(offset)];
    poke(path, offset, static_cast<char>(original ^ static_cast<char>(mask)));
    judge(path + " byte " + std::to_string(offset) + " xor " + std::to_string(mask));
    poke(path, offset, original);
    return silent_.empty();
  }

  void report(const char* title) {
    EXPECT_EQ(examine(), healthy_) << "the test itself left damage behind";
    std::printf("  %s: %lld cases, %lld refused, %lld proven equal, %zu silent\n", title,
                static_cast<long long>(cases_), static_cast<long long>(refused_),
                static_cast<long long>(equal_), silent_.size());
    for (const std::string& each : equal_at_) std::printf("    equal: %s\n", each.c_str());
    EXPECT_GT(cases_, 0);
    for (const std::string& each : silent_) ADD_FAILURE() << each;
  }

 private:
  void put(const std::string& path, const std::string& bytes) {
    storage_.make_directories(path.substr(0, path.rfind('/')));
    if (storage_.is_file(path)) storage_.remove_file(path);
    const std::unique_ptr<WritableFile> file = storage_.create(path);
    if (!bytes.empty()) file->write_at(0, std::as_bytes(std::span(bytes)));
    file->close();
  }
  void poke(const std::string& path, int64_t offset, char byte) {
    const std::unique_ptr<WritableFile> file = storage_.open_write(path);
    file->write_at(offset, std::as_bytes(std::span(&byte, 1)));
    file->close();
  }

  // "iso1:…", "refused", or what no damaged file may cause.
  std::string examine() {
    try {
      checkpoint::ShardedState state = checkpoint::read_checkpoint(storage_, "/source", {});
      reshard::StreamOptions options;
      options.workers = 1;
      options.digest = reshard::digested_leaves(state);
      for (size_t i = 0; i < state.files.size(); ++i) {
        const int64_t size = state.files[i].bytes().size_bytes();
        options.digest.push_back(
            state.add_leaf({.name = state.files[i].relative,
                            .state = "file",
                            .dtype = DType::kUInt8,
                            .shape = {size},
                            .fragments = {{0, size, static_cast<int>(i), 0}}}));
      }
      const reshard::StreamResult read = reshard::digest_leaves(storage_, state, options);
      return "iso1:" + reshard::make_digest(state, read.leaves).root;
    } catch (const Error& error) {
      const ErrorInfo& info = error.info();
      const bool helps = !info.what.empty() && (!info.file.empty() || !info.entry.empty());
      return helps ? "refused" : std::string("an error that names no file: ") + error.what();
    } catch (const CheckFailure& failure) {
      return std::string("CheckFailure: ") + failure.what();
    } catch (const std::exception& failure) {
      return std::string("exception: ") + failure.what();
    }
  }

  void judge(const std::string& what) {
    ++cases_;
    const std::string outcome = examine();
    if (outcome == "refused") {
      ++refused_;
    } else if (outcome == healthy_) {
      ++equal_;
      if (equal_at_.size() < 100) equal_at_.push_back(what);
    } else if (silent_.size() < 20) {
      silent_.push_back(what + ": " + outcome);
    }
  }

  MemoryStorage storage_;
  std::map<std::string, std::string> files_;
  std::string healthy_;
  int64_t cases_ = 0, refused_ = 0, equal_ = 0;
  std::vector<std::string> equal_at_, silent_;
};

// True for each byte that lies in a data/N record of a torch file.
std::vector<bool> payload_bytes(const std::string& bytes) {
  MemoryStorage storage;
  const std::unique_ptr<WritableFile> file = storage.create("/probe");
  file->write_at(0, std::as_bytes(std::span(bytes)));
  file->close();
  std::vector<bool> payload(bytes.size(), false);
  const std::unique_ptr<ReadableFile> source = storage.open_read("/probe");
  const checkpoint::ZipIndex index = checkpoint::read_zip_index(*source);
  for (const checkpoint::ZipRecord& record : index.records) {
    if (record.name.rfind("data/", 0) != 0) continue;
    std::fill_n(payload.begin() + record.data_offset, record.size_bytes, true);
  }
  return payload;
}

struct Flip {
  const std::string* path;
  int64_t offset;
  unsigned char mask;
};

// Every `step`-th byte outside payloads, or inside, turned over and with one bit flipped (at night
// each bit) where it is outside.
std::vector<Flip> flips_of(const Patient& patient, bool payload, int64_t step) {
  std::vector<Flip> flips;
  for (const auto& [path, bytes] : patient.files()) {
    const bool torch = bytes.rfind("PK", 0) == 0;
    const std::vector<bool> inside =
        torch ? payload_bytes(bytes) : std::vector<bool>(bytes.size(), false);
    for (int64_t i = 0, seen = 0; i < static_cast<int64_t>(bytes.size()); ++i) {
      if (inside[static_cast<size_t>(i)] != payload || seen++ % step != 0) continue;
      flips.push_back({&path, i, 0xFF});
      for (int bit = 0; !payload && bit < 8; ++bit) {
        if (is_nightly() || i % 8 == bit)
          flips.push_back({&path, i, static_cast<unsigned char>(1 << bit)});
      }
    }
  }
  return flips;
}

// Calls `work` with `count` indices, or with as many of them as a sanitizer run may take.
void spread(int64_t count, const std::function<bool(int64_t)>& work) {
  const int64_t cases = std::min(count, most_cases());
  for (int64_t i = 0; i < cases; ++i) {
    if (!work(i * count / cases)) return;  // report() says what was silent
  }
}

enum class Where { kOutsidePayloads, kInPayloads };

void flip(const std::string& recording, Where where, int64_t step) {
  Patient patient(recording);
  if (patient.files().empty()) GTEST_SKIP() << "no recording " << traces() / recording;
  const std::vector<Flip> flips =
      flips_of(patient, where == Where::kInPayloads, is_nightly() ? 1 : step);
  spread(static_cast<int64_t>(flips.size()), [&](int64_t i) {
    const Flip& flip = flips[static_cast<size_t>(i)];
    return patient.survives_flip(*flip.path, flip.offset, flip.mask);
  });
  patient.report(recording.c_str());
}

TEST(Damage, EveryByteOutsidePayloadsOfStage0IsSeen) {
  flip("z0_bf16_dp2/ckpt", Where::kOutsidePayloads, 1);
}
TEST(Damage, EveryByteOutsidePayloadsOfStage1IsSeen) {
  flip("z1_bf16_dp2/ckpt", Where::kOutsidePayloads, 1);
}
TEST(Damage, EveryByteOutsidePayloadsOfStage3IsSeen) {
  flip("z3_bf16_dp2_frozen/ckpt", Where::kOutsidePayloads, 1);
}
TEST(Damage, EveryByteOutsidePayloadsOfWeightsIsSeen) {
  flip("z1_bf16_dp2/fp32", Where::kOutsidePayloads, 1);
}
// Some sixty files of much the same form.
TEST(Damage, BytesOutsidePayloadsOfUniversalAreSeen) {
  flip("z1_bf16_dp2/universal", Where::kOutsidePayloads, 61);
}

TEST(Damage, PayloadBytesOfStage1AreSeen) { flip("z1_bf16_dp2/ckpt", Where::kInPayloads, 5); }
TEST(Damage, PayloadBytesOfStage3AreSeen) {
  flip("z3_bf16_dp2_frozen/ckpt", Where::kInPayloads, 5);
}
TEST(Damage, PayloadBytesOfWeightsAreSeen) { flip("z1_bf16_dp2/fp32", Where::kInPayloads, 3); }

// The test's own test: a payload byte and both of its CRCs changed together give another digest
// without an Error, and that must count as silent; no change at all must count as equal.
TEST(Damage, WhatIsSilentIsCounted) {
  Patient patient("z1_bf16_dp2/fp32");
  if (patient.files().empty()) GTEST_SKIP() << "no recording z1_bf16_dp2/fp32";
  const auto& [path, bytes] = *patient.files().begin();
  EXPECT_TRUE(patient.survives(path, bytes, "unchanged"));
  MemoryStorage storage;
  const std::unique_ptr<WritableFile> file = storage.create("/probe");
  file->write_at(0, std::as_bytes(std::span(bytes)));
  const checkpoint::ZipIndex index = checkpoint::read_zip_index(*storage.open_read("/probe"));
  const auto record = std::find_if(
      index.records.begin(), index.records.end(),
      [&](const checkpoint::ZipRecord& each) { return each.name.rfind("data/", 0) == 0; });
  ASSERT_NE(record, index.records.end());
  const auto crc_bytes = [](uint32_t crc) {
    return std::string(reinterpret_cast<const char*>(&crc), 4);
  };
  std::string forged = bytes;
  forged[static_cast<size_t>(record->data_offset)] ^= 1;
  const std::string payload = forged.substr(static_cast<size_t>(record->data_offset),
                                            static_cast<size_t>(record->size_bytes));
  const std::string now = crc_bytes(checkpoint::crc32_of(std::as_bytes(std::span(payload)))),
                    then = crc_bytes(record->crc32);
  int replaced = 0;
  for (size_t at = forged.find(then); at != std::string::npos;
       at = forged.find(then, at + 4), ++replaced)
    forged.replace(at, 4, now);
  EXPECT_EQ(replaced, 2);
  EXPECT_FALSE(patient.survives(path, forged, "forged"));
  EXPECT_EQ(patient.silent(), 1u);
}

void truncate_all(const std::string& recording, const std::string& name, int64_t step) {
  Patient patient(recording);
  if (patient.files().empty()) GTEST_SKIP() << "no recording " << traces() / recording;
  for (const auto& [path, bytes] : patient.files()) {
    if (path.find(name) == std::string::npos) continue;
    spread((static_cast<int64_t>(bytes.size()) + step - 1) / step, [&](int64_t i) {
      return patient.survives(path, bytes.substr(0, static_cast<size_t>(i * step)),
                              path + " cut to " + std::to_string(i * step));
    });
  }
  patient.report(recording.c_str());
}

TEST(Damage, EveryTruncationOfAModelFileIsSeen) {
  truncate_all("z1_bf16_dp2/ckpt", "model_states", 1);
}
TEST(Damage, EveryTruncationOfWeightsIsSeen) {
  truncate_all("z1_bf16_dp2/fp32", "pytorch_model", 1);
}
TEST(Damage, EveryTruncationOfLatestIsSeen) { truncate_all("z1_bf16_dp2/ckpt", "latest", 1); }
TEST(Damage, TruncationsOfOptimizerFilesAreSeen) {
  truncate_all("z1_bf16_dp2/ckpt", "optim_states", 5);
}
TEST(Damage, TruncationsOfStage3FilesAreSeen) {
  truncate_all("z3_bf16_dp2_frozen/ckpt", ".pt", 11);
}

// Bytes behind the end: zeros, garbage, the file once more, the tail of a longer older file.
TEST(Damage, BytesBehindTheEndAreSeen) {
  Patient patient("z1_bf16_dp2/ckpt");
  if (patient.files().empty()) GTEST_SKIP() << "no recording z1_bf16_dp2/ckpt";
  for (const auto& [path, bytes] : patient.files()) {
    if (path.find(".pt") == std::string::npos) continue;
    spread(130, [&](int64_t extra) {
      const auto count = static_cast<size_t>(extra + 1);
      return patient.survives(path, bytes + std::string(count, '\0'), path + " and zeros") &&
             patient.survives(path, bytes + bytes.substr(0, count), path + " and its beginning") &&
             patient.survives(path, std::string(count, 'x') + bytes, path + " behind a prefix");
    });
    patient.survives(path, bytes + bytes, path + " twice");
    for (const auto& [other, older] : patient.files()) {
      if (older.size() <= bytes.size() || other.find(".pt") == std::string::npos) continue;
      patient.survives(path, bytes + older.substr(bytes.size()),
                       path + " written over the longer " + other);
    }
  }
  patient.report("z1_bf16_dp2");
}

// Bursts of up to 64 bytes, blocks of zeros, blocks that stand where others belong.
TEST(Damage, RandomBurstsAreSeen) {
  Patient patient("z1_bf16_dp2/ckpt");
  if (patient.files().empty()) GTEST_SKIP() << "no recording z1_bf16_dp2/ckpt";
  std::vector<const std::string*> paths;
  for (const auto& [path, bytes] : patient.files()) paths.push_back(&path);
  spread(6000, [&](int64_t i) {
    const auto random = [&](uint64_t which) {
      return keyed_random(20260822, {static_cast<uint64_t>(i), which});
    };
    const std::string& path = *paths[random(0) % paths.size()];
    const std::string& bytes = patient.files().at(path);
    const uint64_t kind = random(1) % 3;
    const size_t most = kind == 0 ? 64 : 512;
    const size_t length = std::min(bytes.size(), static_cast<size_t>(1 + random(2) % most));
    const size_t at = random(3) % (bytes.size() - length + 1),
                 from = random(4) % (bytes.size() - length + 1);
    std::string damaged = bytes;
    for (size_t k = 0; k < length; ++k) {
      damaged[at + k] = kind == 0   ? static_cast<char>(random(5 + k))
                        : kind == 1 ? '\0'
                                    : bytes[from + k];
    }
    if (damaged == bytes) return true;
    return patient.survives(path, damaged,
                            path + " burst of " + std::to_string(length) + " at " +
                                std::to_string(at) + ", kind " + std::to_string(kind));
  });
  patient.report("bursts");
}

}  // namespace
}  // namespace isoshard
