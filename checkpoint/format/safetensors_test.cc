// Facts about safetensors: each rule of the format, broken alone, is refused.
#include "checkpoint/format/safetensors.h"

#include <gtest/gtest.h>

#include "checkpoint/memory_storage.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

using namespace std::string_literals;

std::string length_of(uint64_t value) {
  std::string text;
  for (int i = 0; i < 8; ++i) text += static_cast<char>(value >> (8 * i) & 0xFF);
  return text;
}

SafetensorsIndex read(const std::string& bytes) {
  MemoryStorage storage;
  storage.create("/f.safetensors")->write_at(0, std::as_bytes(std::span(bytes)));
  return read_safetensors(*storage.open_read("/f.safetensors"));
}

SafetensorsIndex read(const std::string& header, size_t data_bytes) {
  return read(length_of(header.size()) + header + std::string(data_bytes, 'd'));
}

ErrorCode code_of(const std::string& header, size_t data_bytes) {
  try {
    read(header, data_bytes);
  } catch (const Error& error) {
    return error.info().code;
  }
  ADD_FAILURE() << "accepted " << header;
  return ErrorCode::kUsage;
}

// One entry of four bytes with parts replaced.
std::string entry(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" + offsets + "}";
}

std::string one(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"t":)" + entry(dtype, shape, offsets) + "}";
}

const std::string kF32 = "\"F32\"";

TEST(Safetensors, AGoodFileIsReadInTheOrderOfItsBytes) {
  const std::string header = R"({"__metadata__":{"format":"pt"},"b":)" +
                             entry("\"BF16\"", "[2,3]", "[0,12]") + R"(,"a":)" +
                             entry("\"I64\"", "[]", "[12,20]") + "}";
  const SafetensorsIndex index = read(header, 20);
  ASSERT_EQ(index.entries.size(), 2u);
  EXPECT_EQ(index.entries[0].name, "b");
  EXPECT_EQ(index.entries[0].dtype, DType::kBFloat16);
  EXPECT_EQ(index.entries[0].shape, (Shape{2, 3}));
  EXPECT_EQ(index.entries[0].offset_bytes, 8 + static_cast<int64_t>(header.size()));
  EXPECT_EQ(index.entries[1].shape, Shape{});
  EXPECT_EQ(index.entries[1].offset_bytes, index.entries[0].offset_bytes + 12);
  EXPECT_EQ(index.metadata, (std::vector<std::pair<std::string, std::string>>{{"format", "pt"}}));
}

TEST(Safetensors, AFileWithoutTensorsIsGood) {
  EXPECT_TRUE(read("{}", 0).entries.empty());
  EXPECT_TRUE(read("{}      ", 0).entries.empty());
}

TEST(Safetensors, LengthsThatCannotBeAreRefused) {
  for (const std::string& bytes :
       {""s, "\x02\0\0\0\0\0\0"s, length_of(3) + "{}", length_of(~0ull) + "{}",
        length_of(1ull << 63) + "{}", length_of(100'000'001) + "{}", length_of(0)}) {
    EXPECT_THROW(read(bytes), Error) << testing::PrintToString(bytes);
  }
}

TEST(Safetensors, TheHeaderIsOneJsonObjectFromItsFirstByte) {
  for (const char* header : {" {}", "[]", "{", "{}x", "{},", "null", "{'a':1}", "{\"t\":", "\xFF{}",
                             "{\"a\xFF\":1}", "{} //"}) {
    EXPECT_EQ(code_of(header, 0), ErrorCode::kCorrupt) << header;
  }
  EXPECT_EQ(code_of("{}\0"s, 0), ErrorCode::kCorrupt);
  EXPECT_EQ(code_of(std::string(2000, '[') + std::string(2000, ']'), 0), ErrorCode::kCorrupt);
  std::string deep = "1";
  for (int i = 0; i < 100; ++i) deep = "{\"a\":" + deep + "}";
  EXPECT_EQ(code_of("{\"__metadata__\":" + deep + "}", 0), ErrorCode::kCorrupt);
}

TEST(Safetensors, KeysStandOnceAtEveryLevel) {
  const std::string good = entry(kF32, "[1]", "[0,4]");
  EXPECT_EQ(code_of(R"({"t":)" + good + R"(,"t":)" + good + "}", 4), ErrorCode::kCorrupt);
  EXPECT_EQ(code_of(R"({"t":)" + good + R"(,"\u0074":)" + good + "}", 4), ErrorCode::kCorrupt);
  EXPECT_EQ(code_of(R"({"t":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 4),
            ErrorCode::kCorrupt);
}

TEST(Safetensors, MetadataIsAnObjectOfTexts) {
  EXPECT_EQ(code_of(R"({"__metadata__":{"a":1}})", 0), ErrorCode::kCorrupt);
  EXPECT_EQ(code_of(R"({"__metadata__":{"a":{}}})", 0), ErrorCode::kCorrupt);
  EXPECT_EQ(code_of(R"({"__metadata__":["a"]})", 0), ErrorCode::kCorrupt);
  EXPECT_EQ(code_of(R"({"__metadata__":"a"})", 0), ErrorCode::kCorrupt);
  EXPECT_EQ(code_of(R"({"__metadata__":5})", 0), ErrorCode::kCorrupt);
}

TEST(Safetensors, AnEntryHasDtypeShapeAndOffsets) {
  for (const char* body :
       {"5", "null", "[]", "{}", R"({"dtype":"F32","shape":[1]})",
        R"({"dtype":"F32","data_offsets":[0,4]})", R"({"shape":[1],"data_offsets":[0,4]})"}) {
    EXPECT_EQ(code_of(std::string("{\"t\":") + body + "}", 4), ErrorCode::kCorrupt) << body;
  }
}

TEST(Safetensors, DtypesAreKnownByTheirExactNames) {
  for (const char* dtype : {"\"F31\"", "\"f32\"", "\"\"", "5", "null", "\"float32\""}) {
    EXPECT_EQ(code_of(one(dtype, "[1]", "[0,4]"), 4), ErrorCode::kCorrupt) << dtype;
  }
}

TEST(Safetensors, ShapesAreListsOfNonNegativeIntegers) {
  for (const char* shape :
       {"[-1]", "[1.0]", "[1.5]", "[true]", "[\"1\"]", "1", "null", "[[1]]", "{}",
        "[18446744073709551617]", "[9223372036854775808]", "[4294967296,4294967296]"}) {
    EXPECT_EQ(code_of(one(kF32, shape, "[0,4]"), 4), ErrorCode::kCorrupt) << shape;
  }
}

TEST(Safetensors, OffsetsAreTwoIntegers) {
  for (const char* offsets : {"[]", "[0]", "[0,4,4]", "[0.0,4.0]", "[false,4]", "[\"0\",4]", "4",
                              "null", "{\"0\":0}", "[0,18446744073709551620]"}) {
    EXPECT_EQ(code_of(one(kF32, "[1]", offsets), 4), ErrorCode::kCorrupt) << offsets;
  }
}

TEST(Safetensors, OffsetsFitTheShapeAndTheFile) {
  EXPECT_EQ(read(one(kF32, "[1]", "[0,4]"), 4).entries.size(), 1u);
  for (const char* offsets : {"[0,3]", "[0,5]", "[4,0]", "[-4,0]", "[0,8]", "[4,8]"}) {
    EXPECT_EQ(code_of(one(kF32, "[1]", offsets), 4), ErrorCode::kCorrupt) << offsets;
  }
  EXPECT_EQ(code_of(one(kF32, "[2]", "[0,4]"), 8), ErrorCode::kCorrupt);
  EXPECT_EQ(code_of(one(kF32, "[2]", "[0,4]"), 4), ErrorCode::kCorrupt);
  EXPECT_EQ(code_of(one(kF32, "[1]", "[0,8]"), 8), ErrorCode::kCorrupt);
}

TEST(Safetensors, TensorsTileTheFile) {
  const auto two = [](const std::string& a, const std::string& b) {
    return R"({"a":)" + entry(kF32, "[1]", a) + R"(,"b":)" + entry(kF32, "[1]", b) + "}";
  };
  EXPECT_EQ(read(two("[4,8]", "[0,4]"), 8).entries[0].name, "b");
  EXPECT_EQ(code_of(two("[0,4]", "[0,4]"), 4), ErrorCode::kCorrupt);
  EXPECT_EQ(code_of(two("[0,4]", "[2,6]"), 6), ErrorCode::kCorrupt);
  EXPECT_EQ(code_of(two("[0,4]", "[6,10]"), 10), ErrorCode::kCorrupt);
  EXPECT_EQ(code_of(two("[2,6]", "[6,10]"), 10), ErrorCode::kCorrupt);
  EXPECT_EQ(code_of(two("[0,4]", "[4,8]"), 9), ErrorCode::kCorrupt);
  EXPECT_EQ(code_of(two("[0,4]", "[4,8]"), 7), ErrorCode::kCorrupt);
}

TEST(Safetensors, TensorsWithoutElementsTakeNoBytes) {
  const std::string header = R"({"a":)" + entry(kF32, "[0]", "[0,0]") + R"(,"b":)" +
                             entry(kF32, "[1]", "[0,4]") + R"(,"c":)" +
                             entry(kF32, "[3,0]", "[4,4]") + "}";
  EXPECT_EQ(read(header, 4).entries.size(), 3u);
  EXPECT_EQ(code_of(one(kF32, "[0]", "[0,4]"), 4), ErrorCode::kCorrupt);
  EXPECT_EQ(code_of(one(kF32, "[0]", "[9,9]"), 0), ErrorCode::kCorrupt);
}

TEST(Safetensors, NamesAreSafe) {
  for (const char* name : {"", "../x", "/x", "a\\u0000b", "a\\u001bb", "a/../b"}) {
    const std::string header =
        std::string("{\"") + name + "\":" + entry(kF32, "[1]", "[0,4]") + "}";
    EXPECT_THROW(read(header, 4), Error) << name;
  }
}

TEST(Safetensors, AListHoldsNoLists) {
  std::string wide = "[]";
  for (int i = 0; i < 1000; ++i) wide += ",[]";
  EXPECT_EQ(code_of("{\"t\":[" + wide + "]}", 0), ErrorCode::kCorrupt);
  EXPECT_EQ(code_of(one(kF32, "[[4]]", "[0,16]"), 16), ErrorCode::kCorrupt);
  EXPECT_EQ(code_of(one(kF32, "[{}]", "[0,16]"), 16), ErrorCode::kCorrupt);
  const std::string more = R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":[)";
  EXPECT_EQ(read(more + "1]}}", 4).entries.size(), 1u);  // what nobody reads
  EXPECT_EQ(code_of(more + "[1]]}}", 4), ErrorCode::kCorrupt);
}

TEST(Safetensors, MemoryForTheHeaderHasABudget) {
  std::string keys = "{\"a\":1";
  for (int i = 0; i < 700'000; ++i) keys += ",\"" + std::to_string(i) + "\":1";
  EXPECT_EQ(code_of(keys + "}", 0), ErrorCode::kLimit);
  EXPECT_EQ(code_of("{" + std::string(40'000'000, ' ') + "}", 0), ErrorCode::kLimit);
}

TEST(Safetensors, SeventyThousandTensorsAreNoBomb) {
  std::string header = "{";
  for (int i = 0; i < 70'000; ++i) {
    header +=
        (i ? ",\"model.layers." : "\"model.layers.") + std::to_string(i) + ".weight\":" +
        entry(kF32, "[1]", "[" + std::to_string(4 * i) + "," + std::to_string(4 * i + 4) + "]");
  }
  EXPECT_EQ(read(header + "}", 280'000).entries.size(), 70'000u);
}

TEST(Safetensors, AnImpossibleShapeIsNamedWithItsFile) {
  try {
    read(one(kF32, "[4611686018427387904]", "[0,0]"), 0);
    ADD_FAILURE() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.info().file, "/f.safetensors");
    EXPECT_EQ(error.info().entry, "\"t\"");
    EXPECT_EQ(error.info().found, "[4611686018427387904]");
  }
}

TEST(Safetensors, WhatIsWrittenIsReadBack) {
  SafetensorsIndex index;
  index.metadata = {{"format", "pt"}, {"note", "\"quoted\" \xCE\xB1"}};
  index.entries = {{"z.weight", DType::kFloat32, {2, 3}},
                   {"a", DType::kBFloat16, {}},
                   {"empty", DType::kInt8, {0}},
                   {"m/\xCE\xB1", DType::kBool, {7}}};
  const std::string head = safetensors_head(index);
  const SafetensorsIndex again = read(head + std::string(24 + 2 + 7, 'd'));
  ASSERT_EQ(again.entries.size(), 4u);
  EXPECT_EQ(again.metadata, index.metadata);
  const int64_t data = static_cast<int64_t>(head.size());
  EXPECT_EQ(again.entries[0].name, "z.weight");
  EXPECT_EQ(again.entries[0].offset_bytes, data);
  EXPECT_EQ(again.entries[1].offset_bytes, data + 24);
  EXPECT_EQ(again.entries[2].name, "m/\xCE\xB1");
  EXPECT_EQ(again.entries[2].offset_bytes, data + 26);
  EXPECT_EQ(again.entries[3].name, "empty");
}

TEST(Safetensors, TheHeadIsPaddedWithSpacesToEightBytes) {
  for (size_t extra = 0; extra < 9; ++extra) {
    SafetensorsIndex index;
    index.entries = {{std::string(1 + extra, 'n'), DType::kFloat32, {1}}};
    const std::string head = safetensors_head(index);
    EXPECT_EQ(head.size() % 8, 0u);
    EXPECT_EQ(head.substr(0, 8), length_of(head.size() - 8));
    EXPECT_EQ(head[head.find_last_not_of(' ')], '}');
  }
  EXPECT_EQ(safetensors_head({}), length_of(8) + "{}      ");
}

TEST(Safetensors, ADtypeThatTheFormatLacksIsUnsupported) {
  SafetensorsIndex index;
  index.entries = {{"t", DType::kComplex128, {1}}};
  try {
    safetensors_head(index);
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_EQ(error.info().code, ErrorCode::kUnsupported);
  }
}

TEST(Safetensors, EveryTruncationIsRefused) {
  SafetensorsIndex index;
  index.entries = {{"t", DType::kFloat32, {2}}};
  const std::string whole = safetensors_head(index) + "12345678";
  read(whole);
  for (size_t size = 0; size < whole.size(); ++size) {
    EXPECT_THROW(read(whole.substr(0, size)), Error) << size;
  }
}

}  // namespace
}  // namespace isoshard::checkpoint
