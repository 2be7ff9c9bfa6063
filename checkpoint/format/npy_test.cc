// Heads of .npy files are what numpy.lib.format.write_array_header_1_0 writes.
#include "checkpoint/format/npy.h"

#include <gtest/gtest.h>

#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

TEST(Npy, HeadIsAlignedAndNamesShapeAndDtype) {
  const std::string head = npy_head(DType::kFloat32, {2, 3});
  EXPECT_EQ(head.size() % 64, 0u);
  EXPECT_EQ(head.substr(0, 8), std::string("\x93NUMPY\x01\x00", 8));
  EXPECT_EQ(static_cast<unsigned char>(head[8]) + 256u * static_cast<unsigned char>(head[9]) + 10,
            head.size());
  EXPECT_EQ(head.substr(10, 59), "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }");
  EXPECT_EQ(head.back(), '\n');
}

TEST(Npy, TuplesOfOneAndNoSizeAreWrittenAsPythonDoes) {
  EXPECT_NE(npy_head(DType::kInt64, {7}).find("'shape': (7,), }"), std::string::npos);
  EXPECT_NE(npy_head(DType::kBool, {}).find("'descr': '|b1'"), std::string::npos);
  EXPECT_NE(npy_head(DType::kBool, {}).find("'shape': (), }"), std::string::npos);
}

TEST(Npy, BFloat16IsHeldByFloat32AndEightBitFloatsByNothing) {
  EXPECT_EQ(npy_dtype(DType::kBFloat16), DType::kFloat32);
  EXPECT_EQ(npy_dtype(DType::kFloat8E4M3FN), std::nullopt);
}

// What numpy.dtype(...).str says of each.
TEST(Npy, EachDtypeHasNumpysCode) {
  const std::pair<DType, const char*> codes[] = {
      {DType::kFloat64, "<f8"},   {DType::kFloat32, "<f4"},    {DType::kFloat16, "<f2"},
      {DType::kInt64, "<i8"},     {DType::kInt32, "<i4"},      {DType::kInt16, "<i2"},
      {DType::kInt8, "|i1"},      {DType::kUInt8, "|u1"},      {DType::kBool, "|b1"},
      {DType::kUInt16, "<u2"},    {DType::kUInt32, "<u4"},     {DType::kUInt64, "<u8"},
      {DType::kComplex64, "<c8"}, {DType::kComplex128, "<c16"}};
  for (const auto& [dtype, code] : codes) {
    EXPECT_EQ(npy_dtype(dtype), dtype);
    EXPECT_NE(npy_head(dtype, {1}).find("{'descr': '" + std::string(code) + "', "),
              std::string::npos)
        << code;
  }
}

TEST(Npy, AShapeBeyondTheOldFormIsRefused) {
  EXPECT_THROW(npy_head(DType::kInt8, Shape(30000, 1)), Error);
}

}  // namespace
}  // namespace isoshard::checkpoint
