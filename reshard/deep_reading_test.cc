// --deep notices what no checksum covers: a file that reads otherwise the second time.
#include "reshard/deep_reading.h"

#include <gtest/gtest.h>

#include <atomic>

#include "checkpoint/memory_storage.h"
#include "reshard/verify.h"

namespace isoshard::reshard {
namespace {

// From the read number `from` on, every read that reaches the last byte has it flipped.
class WaveringFile : public ReadableFile {
 public:
  WaveringFile(std::unique_ptr<ReadableFile> base, int from)
      : base_(std::move(base)), from_(from) {}
  const std::string& path() const override { return base_->path(); }
  int64_t size_bytes() const override { return base_->size_bytes(); }
  void read_at(int64_t offset, std::span<std::byte> target) const override {
    base_->read_at(offset, target);
    if (offset + static_cast<int64_t>(target.size()) != size_bytes() || target.empty()) return;
    if (++reads_ >= from_) target.back() ^= std::byte{1};
  }
  int64_t next_data(int64_t offset) const override { return base_->next_data(offset); }
  int64_t next_hole(int64_t offset) const override { return base_->next_hole(offset); }

 private:
  std::unique_ptr<ReadableFile> base_;
  int from_;
  mutable std::atomic<int> reads_{0};
};

class WaveringStorage : public checkpoint::MemoryStorage {
 public:
  int from = 1 << 30;
  int dropped = 0;
  std::unique_ptr<ReadableFile> open_read(const std::string& path) override {
    return std::make_unique<WaveringFile>(MemoryStorage::open_read(path), from);
  }
  void drop_cache(const std::string&) override { ++dropped; }
};

void write(Storage* storage, const std::string& path, const std::string& bytes) {
  const auto file = storage->create(path);
  file->write_at(0, std::as_bytes(std::span(bytes)));
  file->close();
}

Verification deep(WaveringStorage* storage) {
  const std::string header = R"({"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}})";
  std::string bytes(8, '\0');
  bytes[0] = static_cast<char>(header.size());
  storage->make_directories("/weights");
  write(storage, "/weights/model.safetensors", bytes + header + std::string(16, 'x'));
  write(storage, "/weights/notes.txt", "read too");
  VerifyOptions options{.replicas = true, .deep = true, .read = {}, .stream = {}};
  return verify(*storage, "/weights", options);
}

TEST(DeepReading, ASteadyFileIsReadTwiceToTheSameDigest) {
  WaveringStorage storage;
  const Verification result = deep(&storage);
  EXPECT_EQ(result.verdict, Verdict::kComplete);
  ASSERT_TRUE(result.deep);
  EXPECT_TRUE(result.deep->twice);
  EXPECT_EQ(result.deep->dropped, 2);
  EXPECT_EQ(storage.dropped, 4);  // before each pass
  EXPECT_EQ(result.deep->other_files, 1);
}

TEST(DeepReading, OtherBytesTheSecondTimeAreCorrupt) {
  WaveringStorage storage;
  storage.from = 2;
  const Verification result = deep(&storage);
  EXPECT_EQ(result.verdict, Verdict::kCorrupt);
  ASSERT_TRUE(result.deep);
  EXPECT_FALSE(result.deep->twice);
  ASSERT_FALSE(result.findings.empty());
  EXPECT_NE(result.findings[0].text.find("model.safetensors"), std::string::npos);
}

}  // namespace
}  // namespace isoshard::reshard
