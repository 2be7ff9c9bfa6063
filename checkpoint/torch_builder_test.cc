// Facts about the files that TorchBuilder describes. A small assembler makes real bytes of a
// blueprint, so that the project's own reader says what is in them.
#include "checkpoint/torch_builder.h"

#include <gtest/gtest.h>

#include "checkpoint/format/crc.h"
#include "checkpoint/memory_storage.h"
#include "core/check.h"

namespace isoshard::checkpoint {
namespace {

std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text));
}

std::string floats(const std::vector<float>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)};
}

StorageFill fill_of(const std::vector<float>& values) {
  return {.dtype = DType::kFloat32,
          .numel = static_cast<int64_t>(values.size()),
          .runs = {},
          .copy = {},
          .literal = floats(values)};
}

class TorchBuilderTest : public testing::Test {
 protected:
  // Copies are taken from `sources`, by file number.
  TorchFile open(const FileBlueprint& blueprint,
                 const std::vector<const TorchFile*>& sources = {}) {
    std::vector<std::pair<std::string, std::string>> records = {{"data.pkl", blueprint.head}};
    for (size_t i = 0; i < blueprint.storages.size(); ++i) {
      const StorageFill& fill = blueprint.storages[i];
      std::string bytes = fill.literal;
      bytes.resize(static_cast<size_t>(fill.size_bytes()));
      if (fill.copy) {
        EXPECT_EQ(fill.copy->size_bytes, fill.size_bytes());
        const ReadableFile& file = sources[static_cast<size_t>(fill.copy->file)]->file();
        file.read_at(fill.copy->offset_bytes, std::as_writable_bytes(std::span(bytes)));
      }
      records.emplace_back("data/" + std::to_string(i), bytes);
    }
    ZipLayout layout;
    std::string whole;
    std::vector<uint32_t> crcs;
    for (const auto& [name, bytes] : records) {
      const int number = layout.add("a/" + name, static_cast<int64_t>(bytes.size()));
      crcs.push_back(crc32_of(bytes_of(bytes)));
      whole += layout.header(number) + bytes + layout.descriptor(number, crcs.back());
    }
    whole += layout.directory(crcs);
    const std::string path = "/" + std::to_string(++files_);
    storage_.create(path)->write_at(0, bytes_of(whole));
    return TorchFile(storage_, path);
  }

  static TensorView view_at(const TorchFile& file, const std::string& key) {
    return file.tensor(file.pickle().find(file.pickle().root, key)).value();
  }
  static std::vector<float> values_at(const TorchFile& file, const std::string& key) {
    const TensorView view = view_at(file, key);
    std::vector<float> values(static_cast<size_t>(numel(view.shape)));
    file.file().read_at(file.data_offset(view), std::as_writable_bytes(std::span(values)));
    return values;
  }

  MemoryStorage storage_;
  int files_ = 0;
};

TEST_F(TorchBuilderTest, TensorsAreContiguousViewsOfTheirStorage) {
  TorchBuilder builder;
  const int storage = builder.add_storage(fill_of({1, 2, 3, 4, 5, 6, 7}));
  const NodeId a = builder.tensor({.shape = {2, 2}, .storage = storage});
  const NodeId b =
      builder.tensor({.shape = {3}, .storage = storage, .offset = 4, .requires_grad = true});
  const TorchFile file = open(builder.finish("f.pt", builder.dict({{"a", a}, {"b", b}})));
  EXPECT_EQ(file.storages().size(), 1u);
  EXPECT_EQ(view_at(file, "a").stride, (Shape{2, 1}));
  EXPECT_FALSE(view_at(file, "a").requires_grad);
  EXPECT_TRUE(view_at(file, "b").requires_grad);
  EXPECT_EQ(values_at(file, "a"), (std::vector<float>{1, 2, 3, 4}));
  EXPECT_EQ(values_at(file, "b"), (std::vector<float>{5, 6, 7}));
}

TEST_F(TorchBuilderTest, TensorsWithoutElementsAreViewsToo) {
  TorchBuilder builder;
  const int storage = builder.add_storage(fill_of({}));
  const TorchFile file = open(builder.finish(
      "f.pt", builder.dict({{"a", builder.tensor({.shape = {0, 3}, .storage = storage})}})));
  EXPECT_EQ(view_at(file, "a").shape, (Shape{0, 3}));
}

TEST_F(TorchBuilderTest, AnAttributeTravelsWithItsTensor) {
  TorchBuilder builder;
  const int storage = builder.add_storage(fill_of({1, 2}));
  const NodeId node =
      builder.tensor_with_attribute({.shape = {2}, .storage = storage}, "kind", "bias");
  const TorchFile file = open(builder.finish("f.pt", builder.dict({{"a", node}})));
  const TensorView view = view_at(file, "a");
  EXPECT_EQ(view.shape, (Shape{2}));
  const NodeId kind = file.pickle().find(view.attributes, "kind");
  EXPECT_TRUE(file.pickle().is_string(kind, "bias"));
}

TEST_F(TorchBuilderTest, SizesAreThoseOfTorch) {
  TorchBuilder builder;
  const TorchFile file =
      open(builder.finish("f.pt", builder.dict({{"s", builder.size_node({13, 10})}})));
  const Pickle& pickle = file.pickle();
  const ObjectParts& parts = pickle.parts(pickle.find(pickle.root, "s"));
  EXPECT_TRUE(pickle.is_global(parts.callable, "torch", "Size"));
  const std::vector<NodeId>& sizes = pickle.items(pickle.items(parts.args)[0]);
  ASSERT_EQ(sizes.size(), 2u);
  EXPECT_EQ(pickle.integer_value(sizes[0]), 13);
}

TEST_F(TorchBuilderTest, ADtypeWithoutAStorageClassIsOurBug) {
  TorchBuilder builder;
  StorageFill fill;
  fill.dtype = DType::kFloat8E5M2;
  EXPECT_THROW(builder.add_storage(fill), CheckFailure);
}

class TorchBuilderCopy : public TorchBuilderTest {
 protected:
  // {"a": of 4 elements at 0, "b": of 3 elements at 3 in the same storage, "list": [a, 7], "s":
  // 0-d}
  TorchFile source() {
    TorchBuilder builder;
    const int storage = builder.add_storage(fill_of({1, 2, 3, 4, 5, 6, 7}));
    const int step = builder.add_storage(fill_of({9, 3}));
    const NodeId a = builder.tensor({.shape = {4}, .storage = storage});
    const NodeId b = builder.tensor({.shape = {3}, .storage = storage, .offset = 3});
    const NodeId list = builder.pickle.list({a, builder.pickle.integer(7)});
    const NodeId s = builder.tensor({.shape = {}, .storage = step, .offset = 1});
    return open(
        builder.finish("s.pt", builder.dict({{"a", a}, {"b", b}, {"list", list}, {"s", s}})));
  }
};

TEST_F(TorchBuilderCopy, SharedStoragesAndObjectsStaySharedAndAreCopiedOnce) {
  const TorchFile from = source();
  TorchBuilder builder;
  const NodeId root = from.pickle().root;
  std::vector<std::pair<std::string, NodeId>> entries;
  for (const char* key : {"a", "b", "list"}) {
    entries.emplace_back(key, builder.copy(from, 0, from.pickle().find(root, key)));
  }
  const TorchFile file = open(builder.finish("f.pt", builder.dict(entries)), {&from});
  EXPECT_EQ(file.storages().size(), 1u);
  EXPECT_EQ(values_at(file, "a"), (std::vector<float>{1, 2, 3, 4}));
  EXPECT_EQ(values_at(file, "b"), (std::vector<float>{4, 5, 6}));
  const Pickle& pickle = file.pickle();
  EXPECT_EQ(pickle.items(pickle.find(pickle.root, "list"))[0], pickle.find(pickle.root, "a"));
}

TEST_F(TorchBuilderCopy, StoragesOfTwoFilesAreKeptApart) {
  const TorchFile first = source(), second = source();
  TorchBuilder builder;
  const NodeId a = builder.copy(first, 0, first.pickle().find(first.pickle().root, "a"));
  const NodeId b = builder.copy(second, 1, second.pickle().find(second.pickle().root, "b"));
  const TorchFile file =
      open(builder.finish("f.pt", builder.dict({{"a", a}, {"b", b}})), {&first, &second});
  EXPECT_EQ(file.storages().size(), 2u);
  EXPECT_EQ(values_at(file, "b"), (std::vector<float>{4, 5, 6}));
}

TEST_F(TorchBuilderCopy, AReplacedNodeIsReplacedInsideWhatIsCopiedLater) {
  const TorchFile from = source();
  TorchBuilder builder;
  const NodeId root = from.pickle().root;
  const int storage = builder.add_storage(fill_of({8}));
  builder.replace(0, from.pickle().find(root, "a"),
                  builder.tensor({.shape = {1}, .storage = storage}));
  const NodeId list = builder.copy(from, 0, from.pickle().find(root, "list"));
  const TorchFile file = open(builder.finish("f.pt", builder.dict({{"list", list}})), {&from});
  const Pickle& pickle = file.pickle();
  const NodeId item = pickle.items(pickle.find(pickle.root, "list"))[0];
  EXPECT_EQ(file.tensor(item).value().shape, (Shape{1}));
  EXPECT_EQ(file.storages().size(), 1u);
}

TEST_F(TorchBuilderCopy, AScalarTensorGetsAStorageOfItsOwnAtEveryCall) {
  const TorchFile from = source();
  TorchBuilder builder;
  const NodeId s = from.pickle().find(from.pickle().root, "s");
  const NodeId a = builder.copy_scalar(from, 0, s), b = builder.copy_scalar(from, 0, s);
  const TorchFile file = open(builder.finish("f.pt", builder.dict({{"a", a}, {"b", b}})), {&from});
  EXPECT_EQ(file.storages().size(), 2u);
  EXPECT_EQ(file.storages()[0].numel, 1);
  EXPECT_EQ(values_at(file, "a"), (std::vector<float>{3}));
  EXPECT_EQ(values_at(file, "b"), (std::vector<float>{3}));
  EXPECT_EQ(view_at(file, "a").shape, Shape{});
}

TEST_F(TorchBuilderCopy, AScalarThatIsANumberStaysANumber) {
  const TorchFile from = source();
  TorchBuilder builder;
  const Pickle& source_pickle = from.pickle();
  const NodeId seven = source_pickle.items(source_pickle.find(source_pickle.root, "list"))[1];
  const NodeId copy = builder.copy_scalar(from, 0, seven);
  EXPECT_EQ(builder.pickle.integer_value(copy), 7);
}

}  // namespace
}  // namespace isoshard::checkpoint
