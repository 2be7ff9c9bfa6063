// Facts about the executor: every byte arrives, once, whatever the number of workers and open
// files; damage is noticed; zeros stay holes.
#include "reshard/executor.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>

#include "checkpoint/cancel.h"
#include "checkpoint/format/crc.h"
#include "checkpoint/memory_storage.h"
#include "checkpoint/posix_storage.h"
#include "checkpoint/torch_builder.h"
#include "core/cast.h"
#include "core/error.h"
#include "core/polynomial.h"
#include "core/random.h"

namespace isoshard::reshard {
namespace {

using checkpoint::FileBlueprint;
using checkpoint::FileFragment;
using checkpoint::LeafRun;
using checkpoint::MemoryStorage;
using checkpoint::PosixStorage;
using checkpoint::RawCrcs;
using checkpoint::ShardedState;
using checkpoint::StorageFill;
using checkpoint::TorchBuilder;
using checkpoint::TorchFile;

constexpr int64_t kMiB = 1 << 20;

std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text));
}

std::string random_bytes(uint64_t seed, int64_t size) {
  Random random(seed);
  std::string text(static_cast<size_t>(size), '\0');
  for (char& byte : text) byte = static_cast<char>(random.next());
  return text;
}

void write_file(Storage& storage, const std::string& path, const std::string& bytes) {
  const auto file = storage.create(path);
  file->write_at(0, bytes_of(bytes));
  file->close();
}

std::string read_file(Storage& storage, const std::string& path) {
  return read_small_file(storage, path, 1 << 30);
}

void add_plain(Storage& storage, ShardedState* state, const std::string& path) {
  checkpoint::SourceFile file;
  file.path = file.relative = path;
  file.plain = storage.open_read(path);
  state->files.push_back(std::move(file));
}

StorageFill fill_of(DType dtype, int64_t numel, std::vector<LeafRun> runs) {
  return {.dtype = dtype, .numel = numel, .runs = std::move(runs), .copy = {}, .literal = {}};
}

// A file that is nothing but its storages.
FileBlueprint flat_file(const std::string& path, std::vector<StorageFill> storages) {
  return {.path = path,
          .kind = FileBlueprint::Kind::kSafetensors,
          .head = "",
          .storages = std::move(storages)};
}

LeafCrc crc_of(const std::string& bytes) {
  RawCrcs crcs;
  crcs.update(bytes_of(bytes));
  const auto size = static_cast<int64_t>(bytes.size());
  return {true, crc64_ecma_polynomial().finish(crcs.ecma, size),
          crc64_jones_polynomial().finish(crcs.jones, size)};
}

ErrorInfo error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.info();
  }
  ADD_FAILURE() << "no Error was thrown";
  return {};
}

// ---- bytes arrive -------------------------------------------------------------------------------

// A leaf of three MiB in pieces over two files, in no order, none at a round offset.
class ExecutorTest : public testing::Test {
 protected:
  void SetUp() override {
    for (const char* name : {"/a", "/b"})
      write_file(storage_, name, random_bytes(static_cast<unsigned char>(name[1]), 3 * kMiB));
    add_plain(storage_, &state_, "/a");
    add_plain(storage_, &state_, "/b");
    storage_.make_directory("/out");
    const int64_t n = 3 * kMiB / 4;
    std::vector<FileFragment> fragments = {
        {0, 100'003, 0, 4096}, {100'003, 250'000, 1, 52}, {350'003, n - 350'003, 0, 600'004}};
    fragments[2].count = std::min<int64_t>(fragments[2].count, (3 * kMiB - 600'004) / 4);
    const int64_t total = fragments[2].begin + fragments[2].count;
    state_.add_leaf({.name = "t",
                     .state = "weight",
                     .dtype = DType::kFloat32,
                     .shape = {total},
                     .fragments = fragments});
    for (const FileFragment& f : fragments) {
      expected_ +=
          read_file(storage_, f.file == 0 ? "/a" : "/b")
              .substr(static_cast<size_t>(f.offset_bytes), static_cast<size_t>(f.count * 4));
    }
  }
  int64_t total() const { return state_.leaf(0).size_elements(); }
  std::string expected(int64_t begin, int64_t count) const {
    return expected_.substr(static_cast<size_t>(begin * 4), static_cast<size_t>(count * 4));
  }

  MemoryStorage storage_;
  ShardedState state_;
  std::string expected_;
};

TEST_F(ExecutorTest, EveryByteArrivesAndTheHashesAreThoseOfTheFiles) {
  const ReshardPlan plan = make_plan(
      state_, {flat_file("whole", {fill_of(DType::kFloat32, total(), {{0, 0, total(), 0}})}),
               flat_file("sub/part", {fill_of(DType::kFloat32, 700, {{0, 99'990, 600, 100}})})});
  const StreamResult result = execute(storage_, state_, plan, "/out", {.digest = {0}});
  EXPECT_EQ(read_file(storage_, "/out/whole"), expected_);
  EXPECT_EQ(read_file(storage_, "/out/sub/part"), std::string(400, '\0') + expected(99'990, 600));
  EXPECT_EQ(result.leaves[0], crc_of(expected_));
  for (const FileHash& hash : result.files) {
    const std::string bytes = read_file(storage_, "/out/" + hash.path);
    EXPECT_EQ(hash.size_bytes, static_cast<int64_t>(bytes.size()));
    EXPECT_EQ((LeafCrc{true, hash.ecma, hash.jones}), crc_of(bytes)) << hash.path;
  }
  EXPECT_LE(result.bytes_read, 6 * kMiB);
  EXPECT_GE(result.bytes_read, plan.bytes_to_read());
}

TEST_F(ExecutorTest, ACastIsThatOfEveryElement) {
  const ReshardPlan plan = make_plan(
      state_, {flat_file("f", {fill_of(DType::kBFloat16, total(), {{0, 0, total(), 0}})})});
  const StreamResult result = execute(storage_, state_, plan, "/out", {});
  std::string target(expected_.size() / 2, '\0');
  cast(DType::kFloat32, bytes_of(expected_), DType::kBFloat16,
       std::as_writable_bytes(std::span(target)));
  EXPECT_EQ(read_file(storage_, "/out/f"), target);
  EXPECT_EQ((LeafCrc{true, result.files[0].ecma, result.files[0].jones}), crc_of(target));
}

// A safetensors header may have any length, so elements may begin at any byte.
TEST_F(ExecutorTest, ACastOfElementsAtOddOffsetsIsThatOfEveryElement) {
  for (int64_t odd : {1, 2, 3}) {
    const int64_t count = 2 * kMiB / 4 + 5;
    const int leaf = state_.add_leaf({.name = "odd",
                                      .state = "weight",
                                      .dtype = DType::kFloat32,
                                      .shape = {count},
                                      .fragments = {{0, count, 0, 1000 + odd}}});
    const std::string path = "odd" + std::to_string(odd);
    const ReshardPlan plan = make_plan(
        state_, {flat_file(path, {fill_of(DType::kFloat16, count, {{leaf, 0, count, 0}})})});
    execute(storage_, state_, plan, "/out", {.digest = {leaf}});
    const std::string source =
        read_file(storage_, "/a")
            .substr(static_cast<size_t>(1000 + odd), static_cast<size_t>(count * 4));
    std::string target(source.size() / 2, '\0');
    cast(DType::kFloat32, bytes_of(source), DType::kFloat16,
         std::as_writable_bytes(std::span(target)));
    EXPECT_EQ(read_file(storage_, "/out/" + path), target) << odd;
  }
}

// Many targets with pieces from everywhere, written by several workers through few open files.
std::vector<FileBlueprint> many_targets(int64_t total) {
  Random random(7);
  std::vector<FileBlueprint> files;
  for (int i = 0; i < 60; ++i) {
    std::vector<StorageFill> storages;
    for (int64_t s = random.between(1, 3); s > 0; --s) {
      std::vector<LeafRun> runs;
      int64_t at = 0;
      for (int64_t r = random.between(0, 4); r > 0; --r) {
        const int64_t count = random.between(1, 20'000);
        at += random.below(50);
        runs.push_back({0, random.below(total - count), count, at});
        at += count;
      }
      storages.push_back(
          fill_of(i % 3 == 0 ? DType::kBFloat16 : DType::kFloat32, at + random.below(9), runs));
    }
    files.push_back(flat_file("d" + std::to_string(i % 5) + "/f" + std::to_string(i), storages));
  }
  return files;
}

TEST_F(ExecutorTest, TheResultIsTheSameForAnyNumberOfWorkersAndOpenFiles) {
  const ReshardPlan plan = make_plan(state_, many_targets(total()));
  struct Setting {
    int workers, open_files;
  };
  StreamResult first;
  for (const Setting& setting : {Setting{1, 256}, {4, 256}, {1, 2}, {4, 2}, {3, 1}}) {
    const std::string folder =
        "/out/" + std::to_string(setting.workers) + "." + std::to_string(setting.open_files);
    storage_.make_directory(folder);
    const StreamResult result =
        execute(storage_, state_, plan, folder,
                {.workers = setting.workers, .open_files = setting.open_files, .digest = {0}});
    if (first.files.empty()) first = result;
    EXPECT_EQ(result.leaves, first.leaves);
    EXPECT_EQ(result.bytes_read, first.bytes_read);
    EXPECT_EQ(result.bytes_written, first.bytes_written);
    ASSERT_EQ(result.files.size(), 60u);
    for (size_t i = 0; i < result.files.size(); ++i) {
      const std::string bytes = read_file(storage_, folder + "/" + result.files[i].path);
      EXPECT_EQ(bytes, read_file(storage_, "/out/1.256/" + first.files[i].path));
      EXPECT_EQ((LeafCrc{true, result.files[i].ecma, result.files[i].jones}), crc_of(bytes)) << i;
      EXPECT_EQ(result.files[i].size_bytes, static_cast<int64_t>(bytes.size()));
    }
  }
}

TEST_F(ExecutorTest, ManyTargetsHoldWhatTheRunsSay) {
  const ReshardPlan plan = make_plan(state_, many_targets(total()));
  execute(storage_, state_, plan, "/out", {.workers = 4, .open_files = 2});
  for (const FileBlueprint& blueprint : plan.blueprints) {
    std::string bytes;
    for (const StorageFill& fill : blueprint.storages) {
      std::string floats(static_cast<size_t>(fill.numel * 4), '\0');
      for (const LeafRun& run : fill.runs) {
        floats.replace(static_cast<size_t>(run.at * 4), static_cast<size_t>(run.count * 4),
                       expected(run.begin, run.count));
      }
      std::string stored(static_cast<size_t>(fill.size_bytes()), '\0');
      cast(DType::kFloat32, bytes_of(floats), fill.dtype,
           std::as_writable_bytes(std::span(stored)));
      bytes += stored;
    }
    ASSERT_EQ(read_file(storage_, "/out/" + blueprint.path), bytes) << blueprint.path;
  }
}

TEST_F(ExecutorTest, FilesWithoutAPieceAreWrittenToo) {
  FileBlueprint text;
  text.path = "deep/er/latest";
  text.kind = FileBlueprint::Kind::kText;
  text.head = "global_step3";
  FileBlueprint empty = text;
  empty.path = "empty";
  empty.head = "";
  const ReshardPlan plan =
      make_plan(state_, {text, empty, flat_file("zeros", {fill_of(DType::kInt64, 3, {})})});
  const StreamResult result = execute(storage_, state_, plan, "/out", {});
  EXPECT_EQ(read_file(storage_, "/out/deep/er/latest"), "global_step3");
  EXPECT_EQ(read_file(storage_, "/out/empty"), "");
  EXPECT_EQ(read_file(storage_, "/out/zeros"), std::string(24, '\0'));
  EXPECT_EQ((LeafCrc{true, result.files[2].ecma, result.files[2].jones}),
            crc_of(std::string(24, '\0')));
  EXPECT_EQ(result.bytes_read, 0);
}

TEST_F(ExecutorTest, ATargetThatExistsIsNotReplaced) {
  write_file(storage_, "/out/f", "precious");
  const ReshardPlan plan =
      make_plan(state_, {flat_file("f", {fill_of(DType::kFloat32, 9, {{0, 0, 9, 0}})})});
  EXPECT_EQ(error_of([&] { execute(storage_, state_, plan, "/out", {}); }).code,
            ErrorCode::kExists);
  EXPECT_EQ(read_file(storage_, "/out/f"), "precious");
}

TEST_F(ExecutorTest, AFileThatShrankUnderUsIsAnErrorAtTheLowestOffset) {
  storage_.open_write("/a")->set_size(2 * kMiB);
  std::string first;
  for (int round = 0; round < 10; ++round) {
    const ErrorInfo info =
        error_of([&] { digest_leaves(storage_, state_, {.workers = 1, .digest = {0}}); });
    EXPECT_EQ(info.code, ErrorCode::kCorrupt);
    EXPECT_EQ(info.file, "/a");
    if (first.empty()) first = info.expected;
    EXPECT_EQ(info.expected, first);
  }
}

TEST_F(ExecutorTest, ASignalEndsTheWork) {
  checkpoint::cancel_signal() = 15;
  const ErrorInfo info = error_of([&] { digest_leaves(storage_, state_, {.digest = {0}}); });
  checkpoint::cancel_signal() = 0;
  EXPECT_EQ(info.code, ErrorCode::kInterrupted);
}

TEST_F(ExecutorTest, ADigestWritesNothing) {
  const StreamResult result = digest_leaves(storage_, state_, {.workers = 3, .digest = {0}});
  EXPECT_EQ(result.leaves[0], crc_of(expected_));
  EXPECT_EQ(result.bytes_written, 0);
  EXPECT_TRUE(storage_.list("/out").empty());
}

TEST_F(ExecutorTest, LeavesThatShareBytesAreDigestedEach) {
  const int tied = state_.add_leaf({.name = "tied",
                                    .state = "weight",
                                    .dtype = DType::kFloat32,
                                    .shape = {1000},
                                    .fragments = {{0, 500, 0, 4096}, {500, 500, 0, 4096}}});
  const StreamResult result = digest_leaves(storage_, state_, {.digest = {0, tied}});
  EXPECT_EQ(result.leaves[0], crc_of(expected_));
  EXPECT_EQ(result.leaves[static_cast<size_t>(tied)], crc_of(expected(0, 500) + expected(0, 500)));
}

// ---- torch files --------------------------------------------------------------------------------

class ExecutorTorch : public testing::Test {
 protected:
  // One torch file of two storages; the leaf is a small view in the middle of the second one.
  void SetUp() override {
    storage_.make_directory("/out");
    TorchBuilder builder;
    payload_ = random_bytes(3, 40'000);
    for (int i = 0; i < 2; ++i) {
      const int number = builder.add_storage(fill_of(DType::kFloat32, 10'000, {}));
      builder.storage(number).literal = payload_;
      tensors_.push_back(builder.tensor({.shape = {10'000}, .storage = number}));
    }
    const NodeRoot root = builder.dict({{"a", tensors_[0]}, {"b", tensors_[1]}});
    const ReshardPlan plan = make_plan({}, {builder.finish("source.pt", root)});
    execute(storage_, {}, plan, "/out", {});
    open();
  }
  using NodeRoot = checkpoint::NodeId;

  void open() {
    state_ = ShardedState();
    checkpoint::SourceFile file;
    file.path = "/out/source.pt";
    file.relative = "source.pt";
    file.torch = std::make_shared<TorchFile>(storage_, file.path);
    offset_ = file.torch->record(1).data_offset;
    state_.files.push_back(std::move(file));
    state_.add_leaf({.name = "t",
                     .state = "weight",
                     .dtype = DType::kFloat32,
                     .shape = {100},
                     .fragments = {{0, 100, 0, offset_ + 20'000}}});
  }
  void damage(int64_t offset) {
    std::string bytes = read_file(storage_, "/out/source.pt");
    bytes[static_cast<size_t>(offset)] ^= 0x10;
    storage_.open_write("/out/source.pt")->write_at(0, bytes_of(bytes));
  }
  // The same leaf as a file "b.pt" of torch.
  ReshardPlan plan() {
    TorchBuilder builder;
    const int number = builder.add_storage(fill_of(DType::kFloat32, 100, {{0, 0, 100, 0}}));
    const int empty = builder.add_storage(fill_of(DType::kFloat32, 0, {}));
    const NodeRoot root = builder.dict({{"t", builder.tensor({.shape = {100}, .storage = number})},
                                        {"e", builder.tensor({.shape = {0}, .storage = empty})}});
    return make_plan(state_, {builder.finish("b.pt", root)});
  }

  MemoryStorage storage_;
  ShardedState state_;
  std::string payload_;
  std::vector<NodeRoot> tensors_;
  int64_t offset_ = 0;
};

TEST_F(ExecutorTorch, ATargetIsReadBackWithEveryCrcInItsPlace) {
  execute(storage_, state_, plan(), "/out", {});
  const TorchFile file(storage_, "/out/b.pt");
  for (const checkpoint::ZipRecord& record : file.zip().records) {
    std::string bytes(static_cast<size_t>(record.size_bytes), '\0');
    file.file().read_at(record.data_offset, std::as_writable_bytes(std::span(bytes)));
    EXPECT_EQ(checkpoint::crc32_of(bytes_of(bytes)), record.crc32) << record.name;
  }
  const auto view = file.tensor(file.pickle().find(file.pickle().root, "t"));
  std::string bytes(400, '\0');
  file.file().read_at(file.data_offset(view.value()), std::as_writable_bytes(std::span(bytes)));
  EXPECT_EQ(bytes, payload_.substr(20'000, 400));
  EXPECT_EQ(file.zip().records.back().name, ".data/serialization_id");
}

TEST_F(ExecutorTorch, ARecordIsReadWholeSoThatItsCrcIsChecked) {
  const StreamResult result = execute(storage_, state_, plan(), "/out", {});
  EXPECT_EQ(result.bytes_read, 40'000);
}

TEST_F(ExecutorTorch, DamageAnywhereInATouchedRecordIsNamed) {
  for (int64_t at : {int64_t{0}, int64_t{20'100}, int64_t{39'999}}) {
    damage(offset_ + at);
    const ErrorInfo info = error_of([&] { digest_leaves(storage_, state_, {.digest = {0}}); });
    EXPECT_EQ(info.code, ErrorCode::kCorrupt);
    EXPECT_EQ(info.file, "/out/source.pt");
    EXPECT_EQ(info.entry, "\"data/1\"");
    const ErrorInfo moved =
        error_of([&] { execute(storage_, state_, plan(), "/out/" + std::to_string(at), {}); });
    EXPECT_EQ(moved.code, ErrorCode::kCorrupt);
    damage(offset_ + at);
  }
  digest_leaves(storage_, state_, {.digest = {0}});
}

TEST_F(ExecutorTorch, ARecordThatNobodyNeedsIsNotRead) {
  damage(offset_ - 20'000);  // inside data/0
  EXPECT_EQ(digest_leaves(storage_, state_, {.digest = {0}}).leaves[0],
            crc_of(payload_.substr(20'000, 400)));
}

// ---- holes --------------------------------------------------------------------------------------

class ExecutorHoles : public testing::Test {
 protected:
  void SetUp() override {
    const bool memory = ::access("/dev/shm", W_OK) == 0;
    const std::string parent =
        memory ? "/dev/shm" : std::filesystem::temp_directory_path().string();
    root_ = parent + "/isoshard-executor-XXXXXX";
    ASSERT_NE(::mkdtemp(root_.data()), nullptr);
  }
  void TearDown() override { std::filesystem::remove_all(root_); }

  int64_t blocks_bytes(const std::string& name) const {
    struct stat status {};
    EXPECT_EQ(::stat((root_ + "/" + name).c_str(), &status), 0);
    return status.st_blocks * 512;
  }

  PosixStorage storage_;
  std::string root_;
};

TEST_F(ExecutorHoles, ZerosOfTheSourceTakeNoBlocksInTheTarget) {
  // 32 MiB: zeros, a little data, written zeros (not a hole), a hole, a little data.
  constexpr int64_t kSize = 32 * kMiB;
  {
    const auto file = storage_.create(root_ + "/source");
    file->set_size(kSize);
    file->write_at(10 * kMiB + 12, bytes_of("data"));
    file->write_at(11 * kMiB, bytes_of(std::string(4 * kMiB, '\0')));
    file->write_at(kSize - 4, bytes_of("last"));
    file->close();
  }
  ShardedState state;
  add_plain(storage_, &state, root_ + "/source");
  constexpr int64_t kCount = kSize / 4;
  state.add_leaf({.name = "t",
                  .state = "weight",
                  .dtype = DType::kFloat32,
                  .shape = {kCount},
                  .fragments = {{0, kCount, 0, 0}}});
  storage_.make_directory(root_ + "/out");
  const ReshardPlan plan = make_plan(
      state, {flat_file("same", {fill_of(DType::kFloat32, kCount, {{0, 0, kCount, 0}})}),
              flat_file("cast", {fill_of(DType::kFloat16, kCount, {{0, 0, kCount, 0}})})});
  const StreamResult result = execute(storage_, state, plan, root_ + "/out", {.digest = {0}});
  const std::string source = read_file(storage_, root_ + "/source");
  EXPECT_TRUE(read_file(storage_, root_ + "/out/same") == source);  // too long to be printed
  EXPECT_EQ(result.leaves[0], crc_of(source));
  const std::string cast_bytes = read_file(storage_, root_ + "/out/cast");
  EXPECT_EQ((LeafCrc{true, result.files[1].ecma, result.files[1].jones}), crc_of(cast_bytes));
  EXPECT_LE(blocks_bytes("out/same"), 3 * kMiB);
  EXPECT_LE(blocks_bytes("out/cast"), 3 * kMiB);
  EXPECT_LE(result.bytes_written, 4 * kMiB);
}

TEST_F(ExecutorHoles, ATargetOfZerosAloneHasItsSizeAndNoBlocks) {
  const ReshardPlan plan =
      make_plan({}, {flat_file("zeros", {fill_of(DType::kFloat32, 8 * kMiB, {})})});
  storage_.make_directory(root_ + "/out");
  execute(storage_, {}, plan, root_ + "/out", {});
  EXPECT_EQ(storage_.open_read(root_ + "/out/zeros")->size_bytes(), 32 * kMiB);
  EXPECT_LE(blocks_bytes("out/zeros"), 4096);
}

// Lowers the limit of open files to what is open now and a few more; sets it back at the end.
class FewDescriptors {
 public:
  explicit FewDescriptors(rlim_t more) {
    ::getrlimit(RLIMIT_NOFILE, &before_);
    rlimit lower = before_;
    lower.rlim_cur = static_cast<rlim_t>(::dup(0)) + more;
    ::close(static_cast<int>(lower.rlim_cur - more));
    ::setrlimit(RLIMIT_NOFILE, &lower);
  }
  ~FewDescriptors() { ::setrlimit(RLIMIT_NOFILE, &before_); }

 private:
  rlimit before_{};
};

TEST_F(ExecutorHoles, ThreeHundredTargetsAreWrittenWithEightDescriptors) {
  write_file(storage_, root_ + "/source", random_bytes(1, 4 * kMiB));
  ShardedState state;
  add_plain(storage_, &state, root_ + "/source");
  state.add_leaf({.name = "t",
                  .state = "weight",
                  .dtype = DType::kFloat32,
                  .shape = {kMiB},
                  .fragments = {{0, kMiB, 0, 0}}});
  std::vector<FileBlueprint> files;
  for (int i = 0; i < 300; ++i) {  // each takes a piece of every MiB, so that all stay unfinished
    std::vector<LeafRun> runs;
    for (int piece = 0; piece < 4; ++piece)
      runs.push_back({0, piece * kMiB / 4 + i * 800, 800, piece * 800});
    files.push_back(flat_file("f" + std::to_string(i), {fill_of(DType::kFloat32, 3200, runs)}));
  }
  storage_.make_directory(root_ + "/out");
  const ReshardPlan plan = make_plan(state, files);
  StreamResult result;
  {
    const FewDescriptors few(8);
    result = execute(storage_, state, plan, root_ + "/out", {.workers = 2, .open_files = 2});
  }
  const std::string source = read_file(storage_, root_ + "/source");
  for (int i = 0; i < 300; ++i) {
    std::string expected;
    for (int piece = 0; piece < 4; ++piece)
      expected += source.substr(static_cast<size_t>(piece * kMiB + i * 3200), 3200);
    ASSERT_EQ(read_file(storage_, root_ + "/out/f" + std::to_string(i)), expected) << i;
  }
  EXPECT_EQ(result.bytes_written, 300 * 12'800);
}

}  // namespace
}  // namespace isoshard::reshard
