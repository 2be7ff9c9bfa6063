// Files in HDF5 have the same bytes for the same contents, and hold the values as they are given.
// tests/golden*.py reads them with h5py.
#include "checkpoint/format/hdf5.h"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "core/check.h"

namespace isoshard::checkpoint {
namespace {

std::string sample(float second) {
  Hdf5File file;
  file.floats("model/weight", {2, 2}, std::vector<float>{1.5f, second, -0.0f, 3.25f});
  file.doubles("model/loss", {}, std::vector<double>{0.1});
  file.integers("model/steps", {3}, std::vector<int64_t>{7, -8, int64_t{1} << 40});
  file.floats("model/empty", {0, 4}, std::vector<float>{});
  file.attribute("", "seed", int64_t{42});
  file.attribute("model/weight", "dtype", "float32 \xC3\xA9");
  return file.finish();
}

template <typename T>
bool holds(const std::string& bytes, const std::vector<T>& values) {
  std::string wanted(values.size() * sizeof(T), '\0');
  std::memcpy(wanted.data(), values.data(), wanted.size());
  return bytes.find(wanted) != std::string::npos;
}

TEST(Hdf5, ValuesLieThereAsTheyAre) {
  const std::string bytes = sample(-2.0f);
  EXPECT_EQ(bytes.substr(0, 8), "\x89HDF\r\n\x1a\n");
  EXPECT_TRUE(holds<float>(bytes, {1.5f, -2.0f, -0.0f, 3.25f}));
  EXPECT_FALSE(holds<float>(bytes, {1.5f, -2.0f, 0.0f, 3.25f})) << "the sign of a zero is kept";
  EXPECT_TRUE(holds<int64_t>(bytes, {7, -8, int64_t{1} << 40}));
  EXPECT_TRUE(holds<double>(bytes, {0.1}));
  EXPECT_NE(bytes.find("float32 \xC3\xA9"), std::string::npos);
}

TEST(Hdf5, TheSameContentsAreTheSameBytes) {
  EXPECT_EQ(sample(-2.0f), sample(-2.0f));
  EXPECT_NE(sample(-2.0f), sample(2.0f));
}

TEST(Hdf5, AsManyValuesAsElements) {
  Hdf5File file;
  EXPECT_THROW(file.floats("a", {3}, std::vector<float>{1.0f}), CheckFailure);
  EXPECT_THROW(file.doubles("a", {3}, std::vector<double>{1.0}), CheckFailure);
  EXPECT_THROW(file.integers("a", {3}, std::vector<int64_t>{1}), CheckFailure);
}

}  // namespace
}  // namespace isoshard::checkpoint
