// Facts about element types and shapes.
#include "core/dtype.h"

#include <gtest/gtest.h>

#include "core/error.h"

namespace isoshard {
namespace {

constexpr int kTypes = static_cast<int>(DType::kComplex128) + 1;

TEST(DType, EveryNameIsReadBack) {
  for (int i = 0; i < kTypes; ++i) {
    const auto dtype = static_cast<DType>(i);
    DType found = DType::kBool;
    ASSERT_TRUE(parse_dtype(name(dtype), &found)) << name(dtype);
    EXPECT_EQ(found, dtype);
  }
}

TEST(DType, AnUnknownNameLeavesTheAnswerAlone) {
  DType dtype = DType::kInt16;
  for (const char* text : {"", "float", "Float32", "float32 ", "torch.float32", "bf16"}) {
    EXPECT_FALSE(parse_dtype(text, &dtype)) << text;
  }
  EXPECT_EQ(dtype, DType::kInt16);
}

TEST(DType, SizesAreThoseOfTorch) {
  EXPECT_EQ(item_size_bytes(DType::kBool), 1);
  EXPECT_EQ(item_size_bytes(DType::kBFloat16), 2);
  EXPECT_EQ(item_size_bytes(DType::kFloat16), 2);
  EXPECT_EQ(item_size_bytes(DType::kFloat32), 4);
  EXPECT_EQ(item_size_bytes(DType::kUInt64), 8);
  EXPECT_EQ(item_size_bytes(DType::kComplex64), 8);
  EXPECT_EQ(item_size_bytes(DType::kComplex128), 16);
  for (int i = static_cast<int>(DType::kFloat8E4M3FN); i <= static_cast<int>(DType::kFloat8E8M0FNU);
       ++i) {
    EXPECT_EQ(item_size_bytes(static_cast<DType>(i)), 1);
    EXPECT_TRUE(is_floating(static_cast<DType>(i)));
  }
  EXPECT_FALSE(is_floating(DType::kComplex64));
  EXPECT_FALSE(is_floating(DType::kInt64));
}

TEST(Shape, NumelOfNoDimensionsIsOne) {
  EXPECT_EQ(numel({}), 1);
  EXPECT_EQ(numel({13, 10}), 130);
  EXPECT_EQ(numel({5, 0, 7}), 0);
}

TEST(Shape, NegativeOrHugeShapesAreCorrupt) {
  const int64_t big = int64_t{1} << 32;
  for (const Shape& shape : {Shape{-1}, Shape{2, -3}, Shape{0, -1}, Shape{big, big},
                             Shape{INT64_MAX, INT64_MAX}, Shape{(int64_t{1} << 58) + 1}}) {
    try {
      numel(shape);
      ADD_FAILURE() << to_string(shape);
    } catch (const Error& error) {
      EXPECT_EQ(error.info().code, ErrorCode::kCorrupt);
      EXPECT_EQ(error.info().found, to_string(shape));
    }
  }
  EXPECT_EQ(numel({int64_t{1} << 58}), int64_t{1} << 58);
}

TEST(Shape, PrintsAsTorchDoes) {
  EXPECT_EQ(to_string(Shape{}), "[]");
  EXPECT_EQ(to_string(Shape{7}), "[7]");
  EXPECT_EQ(to_string(Shape{13, 10}), "[13, 10]");
}

TEST(Shape, ContiguousStridesCountSizesOfZeroAsOne) {
  EXPECT_EQ(contiguous_stride({}), Shape{});
  EXPECT_EQ(contiguous_stride({7, 5, 3}), (Shape{15, 3, 1}));
  EXPECT_EQ(contiguous_stride({2, 0, 3}), (Shape{3, 3, 1}));
  EXPECT_EQ(contiguous_stride({0}), (Shape{1}));
}

}  // namespace
}  // namespace isoshard
