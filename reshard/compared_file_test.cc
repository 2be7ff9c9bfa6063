// Facts about going on from files that lie there: whatever they hold, they end as a run from the
// beginning leaves them, and what is right is not written again.
#include "reshard/compared_file.h"

#include <gtest/gtest.h>

#include <functional>

#include "checkpoint/memory_storage.h"
#include "core/random.h"
#include "reshard/executor.h"

namespace isoshard::reshard {
namespace {

using checkpoint::FileBlueprint;
using checkpoint::MemoryStorage;

// Counts what is asked of files that existed.
class CountingStorage : public MemoryStorage {
 public:
  int writes = 0, syncs = 0;

  std::unique_ptr<WritableFile> open_write(const std::string& path) override {
    class Counting final : public WritableFile {
     public:
      Counting(std::unique_ptr<WritableFile> file, CountingStorage* counts)
          : file_(std::move(file)), counts_(counts) {}
      void write_at(int64_t offset, std::span<const std::byte> bytes) override {
        ++counts_->writes;
        file_->write_at(offset, bytes);
      }
      void set_size(int64_t size_bytes) override { file_->set_size(size_bytes); }
      void sync() override {
        ++counts_->syncs;
        file_->sync();
      }
      void close() override { file_->close(); }

     private:
      std::unique_ptr<WritableFile> file_;
      CountingStorage* counts_;
    };
    return std::make_unique<Counting>(MemoryStorage::open_write(path), this);
  }
};

class Resume : public testing::Test {
 protected:
  void SetUp() override {
    std::string text(kBytes, '\0');
    Random random(9);
    for (size_t i = 0; i < kBytes; ++i) {
      if (i < 1000 || i >= 9000) text[i] = static_cast<char>(random.next() | 1);
    }
    write("/source", text);
    checkpoint::SourceFile file;
    file.path = file.relative = "/source";
    file.plain = storage_.open_read("/source");
    state_.files.push_back(std::move(file));
    state_.add_leaf({.name = "t",
                     .state = "weight",
                     .dtype = DType::kFloat32,
                     .shape = {kBytes / 4},
                     .fragments = {{0, kBytes / 4, 0, 0}}});
    // A torch file with gaps before, between and behind its runs; the source as it is; mere text; a
    // file that ends in zeros.
    checkpoint::StorageFill gaps{.dtype = DType::kFloat32,
                                 .numel = 900,
                                 .runs = {{0, 5, 200, 100}, {0, 2300, 150, 700}},
                                 .copy = {},
                                 .literal = {}};
    checkpoint::StorageFill cast{
        .dtype = DType::kBFloat16, .numel = 30, .runs = {{0, 0, 20, 7}}, .copy = {}, .literal = {}};
    FileBlueprint torch{.path = "sub/torch.pt",
                        .kind = FileBlueprint::Kind::kTorch,
                        .head = "no pickle",
                        .storages = {gaps, cast}};
    FileBlueprint text_file{
        .path = "text", .kind = FileBlueprint::Kind::kText, .head = "words", .storages = {}};
    FileBlueprint tail{.path = "tail",
                       .kind = FileBlueprint::Kind::kSafetensors,
                       .head = "head",
                       .storages = {{.dtype = DType::kFloat32,
                                     .numel = 50,
                                     .runs = {{0, 0, 20, 7}},
                                     .copy = {},
                                     .literal = {}}}};
    plan_ = make_plan(state_, {torch, checkpoint::whole_copy("copy", 0, kBytes), text_file, tail});
    storage_.make_directory("/fresh");
    options_ = {.digest = {0}};
    fresh_ = execute(storage_, state_, plan_, "/fresh", options_);
    for (const TargetFile& target : plan_.targets) expected_.push_back(read("/fresh", target));
    options_.resume = true;
    options_.sync_files = true;
  }

  void write(const std::string& path, const std::string& text) {
    const auto file = storage_.create(path);
    file->write_at(0, std::as_bytes(std::span(text)));
    file->close();
  }
  std::string read(const std::string& folder, const TargetFile& target) {
    return read_small_file(storage_, folder + "/" + target.path(), 1 << 20);
  }

  // Goes on from these files, "-" for one that is not there; all must end as they must.
  StreamResult go_on(const std::vector<std::string>& files) {
    if (storage_.is_directory("/out")) storage_.remove_tree("/out");
    storage_.make_directories("/out/sub");
    for (size_t i = 0; i < files.size(); ++i) {
      if (files[i] != "-") write("/out/" + plan_.targets[i].path(), files[i]);
    }
    storage_.writes = storage_.syncs = 0;
    const StreamResult result = execute(storage_, state_, plan_, "/out", options_);
    for (size_t i = 0; i < files.size(); ++i) {
      EXPECT_EQ(read("/out", plan_.targets[i]), expected_[i]) << plan_.targets[i].path();
      EXPECT_EQ(result.files[i].ecma, fresh_.files[i].ecma);
      EXPECT_EQ(result.files[i].jones, fresh_.files[i].jones);
    }
    EXPECT_EQ(result.leaves, fresh_.leaves);
    return result;
  }

  static constexpr int64_t kBytes = 10'000;
  CountingStorage storage_;
  checkpoint::ShardedState state_;
  ReshardPlan plan_;
  StreamOptions options_;
  StreamResult fresh_;
  std::vector<std::string> expected_;
};

TEST_F(Resume, WholeFilesAreNotWrittenAgainAndMadeDurable) {
  const StreamResult result = go_on(expected_);
  EXPECT_EQ(storage_.writes, 0);
  EXPECT_EQ(storage_.syncs, 4) << "bytes of a dead run may be nowhere but in memory";
  EXPECT_EQ(result.bytes_written, 0);
  EXPECT_EQ(result.resumed.files_found, 4);
  EXPECT_EQ(result.resumed.files_equal, 4);
  EXPECT_EQ(result.resumed.bytes_equal, plan_.bytes_to_write());
  EXPECT_EQ(result.resumed.bytes_wrong, 0);
}

TEST_F(Resume, AnyByteThatIsWrongIsFoundAndCounted) {
  for (size_t file = 0; file < expected_.size(); ++file) {
    for (size_t at = 0; at < expected_[file].size(); at += at < 2000 ? 1 : 5) {
      std::vector<std::string> files = expected_;
      files[file][at] ^= 0x10;
      const StreamResult result = go_on(files);
      // A piece of one byte that has become zero is as one that was never written.
      EXPECT_LE(result.resumed.bytes_wrong, 1) << at;
      EXPECT_GT(result.bytes_written, 0) << at;
      EXPECT_EQ(result.resumed.files_equal, 3);
      if (HasFailure()) return;
    }
  }
}

TEST_F(Resume, TheLastByteOfEachFileIsCompared) {
  std::vector<std::string> files = expected_;
  for (std::string& text : files) text.back() ^= 1;
  EXPECT_EQ(go_on(files).resumed.bytes_wrong, 4);
}

TEST_F(Resume, FilesOfAnotherSizeOrNoneEndWithTheirs) {
  for (size_t file = 0; file < expected_.size(); ++file) {
    for (const std::string& text :
         {std::string(), std::string("-"), expected_[file].substr(0, expected_[file].size() / 2),
          expected_[file] + "more", std::string(20'000, 'x')}) {
      std::vector<std::string> files = expected_;
      files[file] = text;
      EXPECT_EQ(go_on(files).resumed.files_equal, 3);
    }
  }
}

TEST_F(Resume, WhatIsMissingIsNotCountedAsWrong) {
  std::vector<std::string> files = expected_;
  for (std::string& text : files) text = std::string(text.size(), '\0');
  const StreamResult result = go_on(files);
  EXPECT_EQ(result.resumed.bytes_wrong, 0);
  EXPECT_EQ(result.resumed.files_equal, 0);
}

TEST_F(Resume, RubbishInItsPlaceIsReplacedByZerosToo) {
  std::vector<std::string> files;
  for (const std::string& text : expected_) files.push_back(std::string(text.size(), 'r'));
  EXPECT_GT(go_on(files).resumed.bytes_wrong, 8000) << "zeros are compared, also beside runs";
}

TEST_F(Resume, FewOpenFilesAndManyWorkersChangeNothing) {
  for (const int workers : {1, 5}) {
    options_.workers = workers;
    options_.open_files = 1;
    std::vector<std::string> files = expected_;
    files[0][700] ^= 1;
    files[1] = "-";
    go_on(files);
  }
}

}  // namespace
}  // namespace isoshard::reshard
