// Facts about files of torch.save: which views are tensors, and what is refused.
#include "checkpoint/format/torch_file.h"

#include <gtest/gtest.h>

#include <functional>

#include "checkpoint/format/crc.h"
#include "checkpoint/format/pickle_writer.h"
#include "checkpoint/memory_storage.h"
#include "checkpoint/sharded_state.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

using namespace std::string_literals;

struct Record {
  std::string name, bytes;
};

std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text));
}

std::string archive(const std::vector<Record>& records) {
  ZipLayout layout;
  std::string file;
  std::vector<uint32_t> crcs;
  for (const Record& record : records) {
    const int number = layout.add("a/" + record.name, static_cast<int64_t>(record.bytes.size()));
    crcs.push_back(crc32_of(bytes_of(record.bytes)));
    file += layout.header(number) + record.bytes + layout.descriptor(number, crcs.back());
  }
  return file + layout.directory(crcs);
}

// A file under construction: storages are zeros, the root is a dict of what put() is given.
class Maker {
 public:
  Pickle pickle;
  std::vector<Record> extra = {{"version", "3\n"}};

  NodeId storage_id(const std::string& type, const std::string& key, int64_t numel) {
    const char* module = type == "UntypedStorage" ? "torch.storage" : "torch";
    return pickle.persistent(
        pickle.tuple({pickle.string("storage"), pickle.global(module, type), pickle.string(key),
                      pickle.string("cuda:3"), pickle.integer(numel)}));
  }
  void payload(const std::string& key, int64_t bytes) {
    payloads_.push_back({"data/" + key, std::string(static_cast<size_t>(bytes), '\0')});
  }
  NodeId sizes(const Shape& shape) {
    std::vector<NodeId> items;
    for (int64_t size : shape) items.push_back(pickle.integer(size));
    return pickle.tuple(std::move(items));
  }
  struct View {
    int64_t offset = 0;
    Shape shape, stride;
  };
  std::vector<NodeId> args(NodeId storage, const View& view) {
    return {storage,
            pickle.integer(view.offset),
            sizes(view.shape),
            sizes(view.stride),
            pickle.boolean(false),
            pickle.ordered_dict({})};
  }
  NodeId tensor(NodeId storage, const View& view) {
    return pickle.reduce("torch._utils", "_rebuild_tensor_v2", args(storage, view));
  }
  void put(const std::string& key, NodeId node) {
    entries_.push_back(pickle.string(key));
    entries_.push_back(node);
  }
  std::string bytes() {
    pickle.root = pickle.dict(entries_);
    std::vector<Record> records = {{"data.pkl", write_pickle(pickle)}};
    records.insert(records.end(), payloads_.begin(), payloads_.end());
    records.insert(records.end(), extra.begin(), extra.end());
    return archive(records);
  }

 private:
  std::vector<Record> payloads_;
  std::vector<NodeId> entries_;
};

class TorchFileTest : public testing::Test {
 protected:
  TorchFile open(const std::string& bytes) {
    const std::string path = "/f" + std::to_string(++files_) + ".pt";
    storage_.create(path)->write_at(0, bytes_of(bytes));
    return TorchFile(storage_, path);
  }
  // The view of entry "t" in a file of one float storage of `numel` elements.
  std::optional<TensorView> view(const Maker::View& wanted, int64_t numel = 24) {
    Maker maker;
    maker.payload("0", numel * 4);
    maker.put("t", maker.tensor(maker.storage_id("FloatStorage", "0", numel), wanted));
    const TorchFile file = open(maker.bytes());
    return file.tensor(file.pickle().find(file.pickle().root, "t"));
  }
  static ErrorCode code_of(const std::function<void()>& action) {
    try {
      action();
    } catch (const Error& error) {
      return error.info().code;
    }
    ADD_FAILURE() << "no Error was thrown";
    return ErrorCode::kUsage;
  }

  MemoryStorage storage_;
  int files_ = 0;
};

TEST_F(TorchFileTest, AViewHasItsShapeStrideOffsetAndPlace) {
  Maker maker;
  maker.payload("0", 96);
  maker.put("t", maker.tensor(maker.storage_id("FloatStorage", "0", 24), {4, {5, 2}, {4, 1}}));
  const TorchFile file = open(maker.bytes());
  const NodeId node = file.pickle().find(file.pickle().root, "t");
  const TensorView found = file.tensor(node).value();
  EXPECT_EQ(found.dtype, DType::kFloat32);
  EXPECT_EQ(found.shape, (Shape{5, 2}));
  EXPECT_EQ(found.stride, (Shape{4, 1}));
  EXPECT_EQ(found.offset, 4);
  EXPECT_EQ(file.storages()[0].location, "cuda:3");
  EXPECT_EQ(file.data_offset(found), file.record(0).data_offset + 16);
}

TEST_F(TorchFileTest, TheLastElementOfAViewLiesInsideTheStorage) {
  EXPECT_TRUE(view({0, {24}, {1}}).has_value());
  EXPECT_TRUE(view({20, {2, 2}, {2, 1}}).has_value());
  EXPECT_EQ(code_of([&] {
              view({23, {5, 5}, {0, 0}});
            }),
            ErrorCode::kLimit)
      << "more elements than the storage has";
  for (const Maker::View& bad : {Maker::View{0, {25}, {1}},
                                 {1, {24}, {1}},
                                 {24, {}, {}},
                                 {0, {2, 13}, {12, 1}},
                                 {0, {2}, {24}},
                                 {-1, {1}, {1}},
                                 {0, {2}, {-1}},
                                 {0, {2}, {INT64_MAX}},
                                 {INT64_MAX, {2}, {1}},
                                 {0, {INT64_MAX}, {INT64_MAX}},
                                 {0, {-1}, {1}},
                                 {0, {1 << 20, 1 << 20, 1 << 25}, {0, 0, 0}},
                                 {0, {2}, {1, 1}},
                                 {0, {}, {1}}}) {
    const ErrorCode code = code_of([&] { view(bad); });
    EXPECT_TRUE(code == ErrorCode::kCorrupt || code == ErrorCode::kLimit) << to_string(bad.shape);
  }
}

TEST_F(TorchFileTest, ATensorWithoutElementsMayStandAnywhere) {
  EXPECT_TRUE(view({24, {0}, {1}}).has_value());
  EXPECT_TRUE(view({1000, {3, 0}, {7, 7}}).has_value());
}

TEST_F(TorchFileTest, AScalarIsATensorOfOneElement) {
  const TensorView found = view({23, {}, {}}).value();
  EXPECT_TRUE(found.is_contiguous());
  EXPECT_EQ(numel(found.shape), 1);
}

TEST_F(TorchFileTest, MoreThan64DimensionsAreRefused) {
  EXPECT_TRUE(view({0, Shape(64, 1), Shape(64, 1)}).has_value());
  EXPECT_EQ(code_of([&] { view({0, Shape(65, 1), Shape(65, 1)}); }), ErrorCode::kCorrupt);
}

TEST_F(TorchFileTest, ContiguityIgnoresTheStridesOfSizesOfOne) {
  const auto contiguous = [](const Shape& shape, const Shape& stride) {
    return TensorView{.shape = shape, .stride = stride}.is_contiguous();
  };
  EXPECT_TRUE(contiguous({2, 3}, {3, 1}));
  EXPECT_TRUE(contiguous({1, 3}, {99, 1}));
  EXPECT_TRUE(contiguous({2, 1, 3}, {3, 55, 1}));
  EXPECT_TRUE(contiguous({2, 0}, {5, 5}));
  EXPECT_FALSE(contiguous({3, 2}, {1, 3}));
  EXPECT_FALSE(contiguous({2, 3}, {4, 1}));
  EXPECT_FALSE(contiguous({2}, {2}));
}

// The offsets, in elements, of a view's fragments, each element by the strides' definition.
TEST_F(TorchFileTest, FragmentsOfAStridedViewAreItsElementsInOrder) {
  const Maker::View cases[] = {{2, {2, 3}, {3, 1}},
                               {0, {3, 2}, {1, 3}},
                               {1, {2, 2, 2}, {8, 3, 1}},
                               {0, {2, 1, 3}, {6, 99, 2}},
                               {5, {4}, {0}},
                               {0, {2, 3, 2}, {12, 2, 1}},
                               {3, {}, {}},
                               {0, {3, 4}, {5, 1}},
                               {0, {0, 3}, {3, 1}}};
  for (const Maker::View& wanted : cases) {
    Maker maker;
    maker.payload("0", 96);
    maker.put("t", maker.tensor(maker.storage_id("FloatStorage", "0", 24), wanted));
    const TorchFile file = open(maker.bytes());
    const TensorView view = file.tensor(file.pickle().find(file.pickle().root, "t")).value();
    std::vector<int64_t> found, expected;
    int64_t next = 0;
    for (const FileFragment& f : file_fragments(file, 7, view)) {
      EXPECT_EQ(f.file, 7);
      EXPECT_EQ(f.begin, next);
      next += f.count;
      for (int64_t i = 0; i < f.count; ++i) {
        found.push_back((f.offset_bytes - file.record(0).data_offset) / 4 + i);
      }
    }
    for (int64_t i = 0; i < numel(wanted.shape); ++i) {
      int64_t offset = wanted.offset, rest = i;
      for (size_t d = wanted.shape.size(); d-- > 0; rest /= wanted.shape[d]) {
        offset += rest % wanted.shape[d] * wanted.stride[d];
      }
      expected.push_back(offset);
    }
    EXPECT_EQ(found, expected) << to_string(wanted.shape) << to_string(wanted.stride);
  }
}

struct ClassRow {
  const char* type;
  DType dtype;
};

const ClassRow kClasses[] = {{"FloatStorage", DType::kFloat32},
                             {"DoubleStorage", DType::kFloat64},
                             {"HalfStorage", DType::kFloat16},
                             {"BFloat16Storage", DType::kBFloat16},
                             {"LongStorage", DType::kInt64},
                             {"IntStorage", DType::kInt32},
                             {"ShortStorage", DType::kInt16},
                             {"CharStorage", DType::kInt8},
                             {"ByteStorage", DType::kUInt8},
                             {"BoolStorage", DType::kBool},
                             {"ComplexFloatStorage", DType::kComplex64},
                             {"ComplexDoubleStorage", DType::kComplex128}};

TEST_F(TorchFileTest, EveryStorageClassHasItsDtype) {
  for (const ClassRow& row : kClasses) {
    EXPECT_EQ(storage_type_name(row.dtype), row.type);
    Maker maker;
    maker.payload("0", 3 * item_size_bytes(row.dtype));
    maker.put("t", maker.tensor(maker.storage_id(row.type, "0", 3), {0, {3}, {1}}));
    const TorchFile file = open(maker.bytes());
    const auto found = file.tensor(file.pickle().find(file.pickle().root, "t"));
    EXPECT_EQ(found.value().dtype, row.dtype) << row.type;
  }
  EXPECT_EQ(storage_type_name(DType::kFloat8E5M2), "UntypedStorage");
  EXPECT_EQ(storage_type_name(DType::kUInt16), "UntypedStorage");
}

TEST_F(TorchFileTest, DtypesWithoutAClassAreNamedByTheThirdRebuildFunction) {
  for (const char* dtype : {"uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2",
                            "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"}) {
    DType expected = DType::kBool;
    ASSERT_TRUE(parse_dtype(dtype, &expected));
    const int64_t item = item_size_bytes(expected);
    const auto open_view = [&](int64_t elements) {
      Maker maker;
      maker.payload("0", 6 * item);
      std::vector<NodeId> args =
          maker.args(maker.storage_id("UntypedStorage", "0", 6 * item), {1, {elements}, {1}});
      args.push_back(maker.pickle.global("torch", dtype));
      maker.put("t", maker.pickle.reduce("torch._utils", "_rebuild_tensor_v3", args));
      const TorchFile file = open(maker.bytes());
      const TensorView found = file.tensor(file.pickle().find(file.pickle().root, "t")).value();
      EXPECT_EQ(file.data_offset(found) - file.record(0).data_offset, item);
      return found.dtype;
    };
    EXPECT_EQ(open_view(5), expected) << dtype;
    EXPECT_EQ(code_of([&] { open_view(6); }), ErrorCode::kCorrupt) << dtype;
  }
}

TEST_F(TorchFileTest, AnUntypedTensorNeedsAKnownDtype) {
  const auto open_with = [&](const char* dtype) {
    Maker maker;
    maker.payload("0", 8);
    std::vector<NodeId> args =
        maker.args(maker.storage_id("UntypedStorage", "0", 8), {0, {1}, {1}});
    if (*dtype != '\0') args.push_back(maker.pickle.global("torch", dtype));
    maker.put("t", maker.pickle.reduce("torch._utils", "_rebuild_tensor_v3", args));
    const TorchFile file = open(maker.bytes());
    file.tensor(file.pickle().find(file.pickle().root, "t"));
  };
  EXPECT_EQ(code_of([&] { open_with("float4_e2m1fn_x2"); }), ErrorCode::kCorrupt);
  EXPECT_EQ(code_of([&] { open_with(""); }), ErrorCode::kCorrupt);
}

TEST_F(TorchFileTest, ParametersAndTensorsWithAttributesAreTensors) {
  Maker maker;
  Pickle& pickle = maker.pickle;
  maker.payload("0", 16);
  const NodeId storage = maker.storage_id("FloatStorage", "0", 4);
  const NodeId plain = maker.tensor(storage, {0, {4}, {1}});
  maker.put("parameter", pickle.reduce("torch._utils", "_rebuild_parameter",
                                       {plain, pickle.boolean(true), pickle.ordered_dict({})}));
  const NodeId attributes = pickle.dict({pickle.string("ds_id"), pickle.integer(1)});
  maker.put("attributes",
            pickle.reduce("torch._tensor", "_rebuild_from_type_v2",
                          {pickle.global("torch._utils", "_rebuild_tensor_v2"),
                           pickle.global("torch", "Tensor"),
                           pickle.tuple(maker.args(storage, {1, {3}, {1}})), attributes}));
  maker.put("size", pickle.reduce("torch", "Size", {maker.sizes({4})}));
  maker.put("number", pickle.integer(4));
  const TorchFile file = open(maker.bytes());
  const auto entry = [&](const char* key) {
    return file.tensor(file.pickle().find(file.pickle().root, key));
  };
  EXPECT_EQ(entry("parameter").value().shape, (Shape{4}));
  EXPECT_EQ(entry("attributes").value().offset, 1);
  EXPECT_NE(file.pickle().find(entry("attributes").value().attributes, "ds_id"), kNoNode);
  EXPECT_FALSE(entry("size").has_value());
  EXPECT_FALSE(entry("number").has_value());
  EXPECT_FALSE(entry("absent").has_value());
}

TEST_F(TorchFileTest, SparseAndQuantisedTensorsAreUnsupported) {
  for (const char* function :
       {"_rebuild_sparse_tensor", "_rebuild_qtensor", "_rebuild_wrapper_subclass"}) {
    Maker maker;
    maker.put("t", maker.pickle.reduce("torch._utils", function, {}));
    const TorchFile file = open(maker.bytes());
    const NodeId node = file.pickle().find(file.pickle().root, "t");
    EXPECT_EQ(code_of([&] { file.tensor(node); }), ErrorCode::kUnsupported) << function;
  }
}

TEST_F(TorchFileTest, MalformedTensorsAreCorrupt) {
  const std::function<std::vector<NodeId>(Maker&)> cases[] = {
      [](Maker&) { return std::vector<NodeId>{}; },
      [](Maker& m) {
        return std::vector<NodeId>{m.pickle.none(), m.pickle.integer(0), m.sizes({}), m.sizes({})};
      },
      [](Maker& m) {
        return std::vector<NodeId>{m.storage_id("FloatStorage", "0", 1), m.pickle.none(),
                                   m.sizes({}), m.sizes({})};
      },
      [](Maker& m) {
        return std::vector<NodeId>{m.storage_id("FloatStorage", "0", 1), m.pickle.integer(0),
                                   m.pickle.none(), m.sizes({})};
      },
      [](Maker& m) {
        return std::vector<NodeId>{m.storage_id("FloatStorage", "0", 1), m.pickle.integer(0),
                                   m.pickle.tuple({m.pickle.none()}), m.sizes({1})};
      },
      [](Maker& m) {
        return std::vector<NodeId>{m.storage_id("FloatStorage", "0", 1), m.pickle.integer(0),
                                   m.pickle.reduce("torch", "Size", {}), m.sizes({})};
      },
      [](Maker& m) {
        return std::vector<NodeId>{m.storage_id("FloatStorage", "0", 1), m.pickle.integer(0),
                                   m.pickle.reduce("torch", "Size", {m.pickle.integer(1)}),
                                   m.sizes({})};
      }};
  for (size_t i = 0; i < std::size(cases); ++i) {
    Maker maker;
    maker.payload("0", 4);
    maker.put("used", maker.storage_id("FloatStorage", "0", 1));
    maker.put("t", maker.pickle.reduce("torch._utils", "_rebuild_tensor_v2", cases[i](maker)));
    const TorchFile file = open(maker.bytes());
    const NodeId node = file.pickle().find(file.pickle().root, "t");
    EXPECT_EQ(code_of([&] { file.tensor(node); }), ErrorCode::kCorrupt) << "case " << i;
  }
}

TEST_F(TorchFileTest, PersistentIdsAreThoseOfStorages) {
  const std::function<NodeId(Maker&)> cases[] = {
      [](Maker& m) { return m.pickle.persistent(m.pickle.string("0")); },
      [](Maker& m) { return m.pickle.persistent(m.pickle.tuple({})); },
      [](Maker& m) { return m.storage_id("OddStorage", "0", 4); },
      [](Maker& m) { return m.storage_id("FloatStorage", "../0", 4); },
      [](Maker& m) { return m.storage_id("FloatStorage", "1", 4); },
      [](Maker& m) { return m.storage_id("FloatStorage", "0", 3); },
      [](Maker& m) { return m.storage_id("FloatStorage", "0", -4); },
      [](Maker& m) { return m.storage_id("FloatStorage", "0", INT64_MAX); },
      [](Maker& m) { return m.storage_id("ComplexDoubleStorage", "0", (int64_t{1} << 60) + 1); }};
  for (size_t i = 0; i < std::size(cases); ++i) {
    Maker maker;
    maker.payload("0", 16);
    maker.put("s", cases[i](maker));
    EXPECT_EQ(code_of([&] { open(maker.bytes()); }), ErrorCode::kCorrupt) << "case " << i;
  }
}

TEST_F(TorchFileTest, OneStorageIsDescribedInOneWay) {
  Maker maker;
  maker.payload("0", 16);
  maker.put("a", maker.storage_id("FloatStorage", "0", 4));
  maker.put("b", maker.storage_id("FloatStorage", "0", 4));
  EXPECT_EQ(open(maker.bytes()).storages().size(), 1u);
  maker.put("c", maker.storage_id("IntStorage", "0", 4));
  EXPECT_EQ(code_of([&] { open(maker.bytes()); }), ErrorCode::kCorrupt);
}

TEST_F(TorchFileTest, AStorageThatNoTensorUsesIsRefused) {
  Maker maker;
  maker.payload("0", 16);
  EXPECT_EQ(code_of([&] { open(maker.bytes()); }), ErrorCode::kCorrupt);
}

TEST_F(TorchFileTest, AnEmptyStorageHasARecordToo) {
  Maker maker;
  maker.payload("0", 0);
  maker.put("t", maker.tensor(maker.storage_id("FloatStorage", "0", 0), {0, {0}, {1}}));
  EXPECT_EQ(open(maker.bytes()).storages()[0].numel, 0);
}

TEST_F(TorchFileTest, TheSmallRecordsAreThoseOfTorch) {
  const auto with = [&](const std::vector<Record>& extra) {
    Maker maker;
    maker.extra = extra;
    open(maker.bytes());
  };
  with({});
  with({{".format_version", "1"},
        {".storage_alignment", "64"},
        {"byteorder", "little"},
        {"version", "3\n"},
        {".data/serialization_id", std::string(40, '1')}});
  EXPECT_EQ(code_of([&] { with({{"byteorder", "big"}}); }), ErrorCode::kCorrupt);
  EXPECT_EQ(code_of([&] { with({{"version", "4\n"}}); }), ErrorCode::kCorrupt);
  EXPECT_EQ(code_of([&] { with({{"version", std::string(5000, '3')}}); }), ErrorCode::kCorrupt);
  EXPECT_EQ(code_of([&] { with({{"code/model.py", "x"}}); }), ErrorCode::kCorrupt);
}

TEST_F(TorchFileTest, ADamagedPickleIsFoundByItsCrc) {
  Maker maker;
  maker.put("t", maker.pickle.string("some text"));
  std::string bytes = maker.bytes();
  bytes[bytes.find("some text")] ^= 1;
  EXPECT_EQ(code_of([&] { open(bytes); }), ErrorCode::kCorrupt);
}

TEST_F(TorchFileTest, APickleThatNamesAHostileFunctionIsRefusedUnread) {
  Maker maker;
  maker.put("t", maker.pickle.reduce("os", "system", {maker.pickle.string("true")}));
  EXPECT_EQ(code_of([&] { open(maker.bytes()); }), ErrorCode::kHostile);
}

TEST_F(TorchFileTest, OtherFormsOfFilesAreNamed) {
  EXPECT_EQ(code_of([&] { open("\x80\x02\x8a\x0a and so on"); }), ErrorCode::kUnsupported);
  EXPECT_EQ(code_of([&] { open(archive({{"version", "3\n"}})); }), ErrorCode::kIncomplete);
  EXPECT_EQ(code_of([&] { open(""); }), ErrorCode::kIncomplete);
  EXPECT_EQ(code_of([&] { open("<html>not a checkpoint at all</html>"); }), ErrorCode::kIncomplete);
}

TEST_F(TorchFileTest, AFileWithoutARecordIsRefused) {
  EXPECT_EQ(code_of([&] { open(archive({})); }), ErrorCode::kIncomplete);
}

}  // namespace
}  // namespace isoshard::checkpoint
