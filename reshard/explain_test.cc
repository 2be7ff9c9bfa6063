// What the search for explanations finds, on tensors in memory; and that it claims nothing false.
#include "reshard/explain.h"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>

#include "core/cast.h"
#include "core/random.h"
#include "reshard/run_cover.h"

namespace isoshard::reshard {
namespace {

std::vector<std::byte> bytes_of(const std::vector<float>& values) {
  std::vector<std::byte> bytes(values.size() * sizeof(float));
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

TensorValues tensor(const std::string& name, const std::vector<float>& values,
                    const std::string& state = "weight") {
  const std::vector<std::byte> bytes = bytes_of(values);
  const auto read = [bytes](int64_t begin, std::span<std::byte> target) {
    ASSERT_LE(static_cast<size_t>(begin) * sizeof(float) + target.size(), bytes.size());
    std::memcpy(target.data(), bytes.data() + static_cast<size_t>(begin) * sizeof(float),
                target.size());
  };
  return {name, state, DType::kFloat32, {static_cast<int64_t>(values.size())}, read};
}

TensorValues matrix(const std::string& name, const Shape& shape, const std::vector<float>& values) {
  TensorValues result = tensor(name, values);
  result.shape = shape;
  return result;
}

// Values without a repetition among them, another set for each seed.
std::vector<float> distinct(size_t count, int seed) {
  std::vector<float> values(count);
  for (size_t i = 0; i < count; ++i) {
    values[i] = static_cast<float>(seed) + static_cast<float>(7 * i + 1) / 65536.0F;
  }
  return values;
}

std::vector<float> slice(const std::vector<float>& values, size_t begin, size_t end) {
  return {values.begin() + static_cast<ptrdiff_t>(begin),
          values.begin() + static_cast<ptrdiff_t>(end)};
}

std::vector<float> concat(std::vector<float> a, const std::vector<float>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

const std::vector<float> kUp = distinct(170, 1), kBias = distinct(17, 2), kNorm = distinct(10, 3),
                         kDown = distinct(170, 4), kScale = {0.75F};

std::vector<TensorValues> model() {
  return {tensor("scale", kScale), tensor("up", kUp),
          tensor("bias", kBias),   tensor("norm", kNorm),
          tensor("down", kDown),   tensor("up", distinct(170, 5), "exp_avg")};
}

std::string explain(const TensorValues& found) { return Explainer(model()).explain(found); }

TEST(Explain, ARunOfAnotherTensorIsNamedWithItsRange) {
  EXPECT_EQ(explain(tensor("bias", slice(kDown, 40, 57))), "down[40:57]");
}

TEST(Explain, ARunAcrossNeighboursIsTheirSum) {
  EXPECT_EQ(explain(tensor("down", concat(slice(kUp, 3, 170), slice(kBias, 0, 3)))),
            "up[3:170] + bias[0:3]");
}

TEST(Explain, AShortTailBeforeTheNextTensorIsFound) {
  EXPECT_EQ(explain(tensor("norm", concat(slice(kUp, 168, 170), slice(kBias, 0, 8)))),
            "up[168:170] + bias[0:8]");
}

TEST(Explain, AWholeTensorShorterThanAWindowIsFoundAmongOthers) {
  EXPECT_EQ(explain(tensor("norm", concat(kScale, slice(kUp, 0, 9)))), "scale[0:1] + up[0:9]");
}

TEST(Explain, ATensorShorterThanAWindowIsFoundWhereItsValueIsUnique) {
  EXPECT_EQ(explain(tensor("scale", {kDown[12]})), "down[12:13]");
}

TEST(Explain, TheSameTensorMayBeShifted) {
  EXPECT_EQ(explain(tensor("down", concat(slice(kDown, 5, 170), {0, 0, 0, 0, 0}))),
            "the same tensor shifted by 5: down[5:170] + 5 times 0 (as padding has)");
}

TEST(Explain, ZerosAreZerosAndNegativeZerosAreNot) {
  EXPECT_EQ(explain(tensor("bias", std::vector<float>(17, 0.0F))), "zeros");
  EXPECT_EQ(explain(tensor("bias", std::vector<float>(17, -0.0F))), "17 times -0");
}

TEST(Explain, AFlippedBitIsFoundBeforeAnythingElse) {
  std::vector<float> values = kUp;
  values[100] = -values[100];
  EXPECT_EQ(explain(tensor("up", values)), "the same tensor with bit 31 flipped in one element");
}

TEST(Explain, ARoundTripThroughALowerPrecisionIsACast) {
  std::vector<float> brain = kUp, half = kUp;
  for (float& value : brain) value = float_from_bfloat16(bfloat16_from_float(value));
  for (float& value : half) value = float_from_half(half_from_float(value));
  EXPECT_EQ(explain(tensor("up", brain)), "the same tensor cast to bfloat16 and back");
  EXPECT_EQ(explain(tensor("up", half)), "the same tensor cast to float16 and back");
}

TEST(Explain, AnotherStateOfTheSameParameterIsNamed) {
  EXPECT_EQ(explain(tensor("up", distinct(170, 5))), "the exp_avg of the same parameter");
}

TEST(Explain, ARunOfAnotherStateSaysSo) {
  EXPECT_EQ(explain(tensor("bias", slice(distinct(170, 5), 3, 20))), "exp_avg of up[3:20]");
}

TEST(Explain, ATransposeIsFoundForMatricesThatAreNotSquare) {
  const std::vector<float> values = distinct(6, 1);
  const std::vector<float> transposed = {values[0], values[3], values[1],
                                         values[4], values[2], values[5]};
  Explainer explainer({matrix("m", {2, 3}, values)});
  EXPECT_EQ(explainer.explain(matrix("m", {2, 3}, transposed)), "the transpose of the same tensor");
  EXPECT_EQ(explainer.explain(matrix("m", {3, 2}, transposed)), "the transpose of the same tensor");
}

TEST(Explain, OneForeignValueLeavesNothingToClaim) {
  std::vector<float> values = slice(kDown, 40, 57);
  values[8] = 9.5F;
  EXPECT_EQ(explain(tensor("bias", values)), kNoExplanation);
}

TEST(Explain, ARunIsPreferredInPlaceOverTheSameValuesElsewhere) {
  const std::vector<float> same = distinct(20, 1);
  Explainer explainer({tensor("a", same), tensor("b", concat(same, distinct(4, 2)))});
  EXPECT_EQ(explainer.explain(tensor("b", concat(same, {0, 0, 0, 0}))),
            "b[0:20] + 4 times 0 (as padding has)");
}

TEST(Explain, NamesThatCannotBePrintedAreQuoted) {
  Explainer explainer({tensor("a b", kUp), tensor("c", kBias)});
  EXPECT_EQ(explainer.explain(tensor("c", slice(kUp, 1, 18))), "\"a b\"[1:18]");
}

TEST(RunCover, EveryRandomConcatenationIsCoveredByRunsThatHoldItsBits) {
  const std::vector<TensorValues> originals = model();
  const WindowIndex index(originals, DType::kFloat32);
  Random random(17);
  for (int repeat = 0; repeat < 200; ++repeat) {
    std::vector<float> values;
    for (int piece = 0; piece < 5; ++piece) {
      const std::vector<float>& from = piece % 2 == 0 ? kUp : kDown;
      const size_t begin = static_cast<size_t>(random.below(150));
      const size_t count = static_cast<size_t>(random.between(4, 19));
      values = concat(values, slice(from, begin, begin + count));
    }
    const TensorValues found = tensor("x", values);
    const auto runs = cover_with_runs(originals, index, found, -1);
    ASSERT_TRUE(runs.has_value());
    int64_t at = 0;
    for (const reshard::Run& run : *runs) {
      ASSERT_GE(run.tensor, 0);
      const TensorValues& original = originals[static_cast<size_t>(run.tensor)];
      EXPECT_EQ(read_elements(original, run.begin, run.count), read_elements(found, at, run.count));
      at += run.count;
    }
    EXPECT_EQ(at, found.size_elements());
  }
}

TEST(WindowIndex, IndexesEveryWindowOfSmallTensorsButNoConstantOnes) {
  const std::vector<TensorValues> originals = {tensor("ones", std::vector<float>(9, 1.0F)),
                                               tensor("up", kUp)};
  const WindowIndex index(originals, DType::kFloat32);
  EXPECT_EQ(index.stride(), 1);
  EXPECT_TRUE(index.find(bytes_of({1, 1, 1, 1})).empty());
  EXPECT_EQ(index.find(bytes_of(slice(kUp, 166, 170))),
            (std::vector<Occurrence>{{.tensor = 1, .begin = 166}}));
}

TEST(TensorValues, UlpDistanceCountsAcrossZeroAndRefusesNaN) {
  const auto distance = [](float a, float b) {
    return ulp_distance(DType::kFloat32, bytes_of({a}), bytes_of({b}));
  };
  const float tiny = std::numeric_limits<float>::denorm_min();
  EXPECT_EQ(distance(tiny, -tiny), 2);
  EXPECT_EQ(distance(0.0F, -0.0F), 0);
  EXPECT_EQ(distance(1.0F, 1.0F + std::numeric_limits<float>::epsilon()), 1);
  EXPECT_EQ(distance(1.0F, std::numeric_limits<float>::quiet_NaN()),
            std::numeric_limits<int64_t>::max());
}

}  // namespace
}  // namespace isoshard::reshard
