// Heads of .npy files are what numpy.lib.format.write_array_header_1_0 writes.
#include "checkpoint/format/npy.h"

#include <gtest/gtest.h>

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

}  // namespace
}  // namespace isoshard::checkpoint
